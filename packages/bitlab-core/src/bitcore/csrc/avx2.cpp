// AVX2, with FMA's neighbours F16C; no VNNI.

#include <immintrin.h>

#include "ternary.h"

namespace {

template <int32_t kDtype>
inline __m256 load_eight(const void *x, int64_t index) {
    if constexpr (kDtype == BITCORE_F32) return _mm256_loadu_ps(static_cast<const float *>(x) + index);
    const __m128i half =
        _mm_loadu_si128(reinterpret_cast<const __m128i *>(static_cast<const uint16_t *>(x) + index));
    if constexpr (kDtype == BITCORE_F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// Eight values, or those that are left and zeros behind them.
template <int32_t kDtype>
inline __m256 load_some(const void *x, int64_t index, int64_t count) {
    if (count >= 8) return load_eight<kDtype>(x, index);
    const int64_t size = kDtype == BITCORE_F32 ? 4 : 2;
    alignas(32) char few[32] = {};
    memcpy(few, static_cast<const char *>(x) + index * size, count * size);
    return load_eight<kDtype>(few, 0);
}

template <int32_t kDtype>
inline void store_some(void *out, int64_t index, int64_t count, __m256 values) {
    const int64_t size = kDtype == BITCORE_F32 ? 4 : 2;
    alignas(32) char eight[32];
    if constexpr (kDtype == BITCORE_F32) {
        _mm256_store_ps(reinterpret_cast<float *>(eight), values);
    } else if constexpr (kDtype == BITCORE_F16) {
        const __m128i half = _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_store_si128(reinterpret_cast<__m128i *>(eight), half);
    } else {
        const __m256i bits = _mm256_castps_si256(values);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
        const __m256 nan = _mm256_cmp_ps(values, values, _CMP_UNORD_Q);
        const __m256i whole = _mm256_srli_epi32(
            _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(nan)), 16);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(whole, whole), 0x08);
        _mm_store_si128(reinterpret_cast<__m128i *>(eight), _mm256_castsi256_si128(packed));
    }
    memcpy(static_cast<char *>(out) + index * size, eight, bitcore_min(count, 8) * size);
}

template <int32_t kDtype>
uint32_t largest_of(const void *x, int64_t count) {
    __m256i most = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i += 8) {
        const __m256i bits = _mm256_castps_si256(load_some<kDtype>(x, i, count - i));
        most = _mm256_max_epi32(most, _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff)));
    }
    alignas(32) uint32_t eight[8];
    _mm256_store_si256(reinterpret_cast<__m256i *>(eight), most);
    uint32_t found = 0;
    for (int i = 0; i < 8; ++i) found = eight[i] > found ? eight[i] : found;
    return found;
}

template <int32_t kDtype>
int32_t round_floats(const void *x, int64_t count, float factor, int8_t *codes) {
    const __m256 by = _mm256_set1_ps(factor);
    __m256i sum = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i += 8) {
        const __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(load_some<kDtype>(x, i, count - i), by));
        sum = _mm256_add_epi32(sum, whole);
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole, whole), 0x08);
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_castsi256_si128(words));
        // Codes are followed by room for whole blocks, which is cleared afterwards.
        _mm_storel_epi64(reinterpret_cast<__m128i *>(codes + i), bytes);
    }
    alignas(32) int32_t eight[8];
    _mm256_store_si256(reinterpret_cast<__m256i *>(eight), sum);
    uint32_t total = 0;
    for (int i = 0; i < 8; ++i) total += uint32_t(eight[i]);
    return int32_t(total);
}

template <int32_t kDtype>
void finish(const bitcore_work *work, int64_t m, int64_t row, __m256i sums) {
    const bitcore_layer *layer = work->layer;
    const int64_t count = layer->rows - row;
    if (count <= 0) return;
    const __m256i whole = _mm256_sub_epi32(sums, _mm256_set1_epi32(work->sums[m]));
    const __m256 scale =
        _mm256_mul_ps(_mm256_set1_ps(work->scales[m]), load_some<BITCORE_F32>(layer->scale, row, count));
    __m256 values = _mm256_mul_ps(_mm256_cvtepi32_ps(whole), scale);
    if (layer->bias) values = _mm256_add_ps(values, load_some<kDtype>(layer->bias, row, count));
    store_some<kDtype>(work->out, m * layer->rows + row, count, values);
}

void finish_any(const bitcore_work *work, int64_t m, int64_t row, __m256i sums) {
    switch (work->layer->dtype) {
        case BITCORE_F32: return finish<BITCORE_F32>(work, m, row, sums);
        case BITCORE_BF16: return finish<BITCORE_BF16>(work, m, row, sums);
        default: return finish<BITCORE_F16>(work, m, row, sums);
    }
}

// Products of two codes and two activations are at most 508, so that 16 bits hold 64 of them: sixteen steps.
constexpr int kShort = 16;

// Several rows of inputs and several half groups, 8 rows of the weight each, at once: as many sums as
// the registers hold.
template <int kHalves, int kRows, int kAtOnce>
inline void some_halves(const bitcore_work *work, const uint8_t *bytes, const int8_t *codes, __m256i (*sums)[kAtOnce]) {
    const __m256i low = _mm256_set1_epi8(0x03), ones = _mm256_set1_epi16(1);
    for (int64_t start = 0; start < work->steps; start += kShort) {
        __m256i few[kRows][kAtOnce];
        for (int r = 0; r < kRows; ++r)
            for (int h = 0; h < kAtOnce; ++h) few[r][h] = _mm256_setzero_si256();
        const int64_t end = bitcore_min(start + kShort, work->steps);
        for (int64_t s = start; s < end; ++s) {
            const uint8_t *step = bytes + s * kHalves * 32;
            __m256i quads[kRows][4];
            for (int r = 0; r < kRows; ++r)
                for (int p = 0; p < 4; ++p) {
                    int32_t quad;
                    memcpy(&quad, codes + r * work->stride + 16 * s + 4 * p, 4);
                    quads[r][p] = _mm256_set1_epi32(quad);
                }
            for (int h = 0; h < kAtOnce; ++h) {
                const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(step) + h);
                for (int p = 0; p < 4; ++p) {
                    const __m256i weights = _mm256_and_si256(p ? _mm256_srli_epi16(packed, 2 * p) : packed, low);
                    for (int r = 0; r < kRows; ++r)
                        few[r][h] = _mm256_add_epi16(few[r][h], _mm256_maddubs_epi16(weights, quads[r][p]));
                }
            }
        }
        for (int r = 0; r < kRows; ++r)
            for (int h = 0; h < kAtOnce; ++h)
                sums[r][h] = _mm256_add_epi32(sums[r][h], _mm256_madd_epi16(few[r][h], ones));
    }
}

template <int kHalves, int kRows, int kAtOnce>
void some_inputs(const bitcore_work *work, int64_t tile, const uint8_t *bytes, int64_t m) {
    for (int first = 0; first < kHalves; first += kAtOnce) {
        __m256i sums[kRows][kAtOnce] = {};
        some_halves<kHalves, kRows, kAtOnce>(work, bytes + first * 32, work->codes + m * work->stride, sums);
        for (int r = 0; r < kRows; ++r)
            for (int h = 0; h < kAtOnce; ++h) finish_any(work, m + r, tile * 64 + 8 * (first + h), sums[r][h]);
    }
}

template <int kHalves>
void tile_of(const bitcore_work *work, int64_t tile, const uint8_t *bytes) {
    int64_t m = 0;
    for (; m + 4 <= work->inputs; m += 4) some_inputs<kHalves, 4, 2>(work, tile, bytes, m);
    for (; m < work->inputs; ++m) some_inputs<kHalves, 1, kHalves>(work, tile, bytes, m);
}

void tiles(const bitcore_work *work, int64_t begin, int64_t end, void *) {
    for (int64_t tile = begin; tile < end; ++tile) {
        int groups;
        const uint8_t *bytes = bitcore_tile(work, tile, &groups);
        switch (groups) {
            case 1: tile_of<2>(work, tile, bytes); break;
            case 2: tile_of<4>(work, tile, bytes); break;
            case 3: tile_of<6>(work, tile, bytes); break;
            default: tile_of<8>(work, tile, bytes);
        }
    }
}

int64_t scratch_bytes(const bitcore_work *) { return 0; }

}  // namespace

const bitcore_set bitcore_avx2 = {
    {largest_of<BITCORE_F32>, largest_of<BITCORE_BF16>, largest_of<BITCORE_F16>},
    {round_floats<BITCORE_F32>, round_floats<BITCORE_BF16>, round_floats<BITCORE_F16>},
    tiles,
    scratch_bytes,
};
