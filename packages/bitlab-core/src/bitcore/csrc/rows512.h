// Reading, rounding and writing rows with AVX-512; for units that are compiled for it.
#pragma once

#include <immintrin.h>

#include "ternary.h"

namespace {

inline __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? __mmask16(0xffff) : __mmask16((1u << count) - 1);
}

template <int32_t kDtype>
inline __m512 load_floats(const void *x, int64_t index, __mmask16 lanes) {
    if constexpr (kDtype == BITCORE_F32) {
        return _mm512_maskz_loadu_ps(lanes, static_cast<const float *>(x) + index);
    } else {
        const __m256i half = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t *>(x) + index);
        if constexpr (kDtype == BITCORE_F16) return _mm512_cvtph_ps(half);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
}

template <int32_t kDtype>
inline void store_floats(void *out, int64_t index, __mmask16 lanes, __m512 values) {
    if constexpr (kDtype == BITCORE_F32) {
        _mm512_mask_storeu_ps(static_cast<float *>(out) + index, lanes, values);
        return;
    }
    __m256i half;
    if constexpr (kDtype == BITCORE_F16) {
        half = _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
        const __m512i bits = _mm512_castps_si512(values);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
        const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
        rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
        half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    }
    _mm256_mask_storeu_epi16(static_cast<uint16_t *>(out) + index, lanes, half);
}

template <int32_t kDtype>
uint32_t largest_of(const void *x, int64_t count) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i most[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    int64_t i = 0;
    for (; i + 32 <= count; i += 32)
        for (int part = 0; part < 2; ++part) {
            const __m512 values = load_floats<kDtype>(x, i + 16 * part, 0xffff);
            most[part] = _mm512_max_epi32(most[part], _mm512_and_si512(_mm512_castps_si512(values), magnitude));
        }
    for (; i < count; i += 16) {
        const __m512 values = load_floats<kDtype>(x, i, first_lanes(count - i));
        most[0] = _mm512_max_epi32(most[0], _mm512_and_si512(_mm512_castps_si512(values), magnitude));
    }
    return uint32_t(_mm512_reduce_max_epi32(_mm512_max_epi32(most[0], most[1])));
}

template <int32_t kDtype>
int32_t round_floats(const void *x, int64_t count, float factor, int8_t *codes) {
    const __m512 by = _mm512_set1_ps(factor);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 lanes = first_lanes(count - i);
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(load_floats<kDtype>(x, i, lanes), by));
        sum = _mm512_add_epi32(sum, whole);
        _mm_mask_storeu_epi8(codes + i, lanes, _mm512_cvtsepi32_epi8(whole));
    }
    return _mm512_reduce_add_epi32(sum);
}

// Scale 16 sums of one row of inputs and write them: the rows of the weight from `row` on.
template <int32_t kDtype>
inline void finish(const bitcore_work *work, int64_t m, int64_t row, __m512i sums) {
    const bitcore_layer *layer = work->layer;
    const __mmask16 lanes = first_lanes(layer->rows - row);
    const __m512i whole = _mm512_sub_epi32(sums, _mm512_set1_epi32(work->sums[m]));
    const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(work->scales[m]), _mm512_maskz_loadu_ps(lanes, layer->scale + row));
    __m512 values = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), scale);
    if (layer->bias) values = _mm512_add_ps(values, load_floats<kDtype>(layer->bias, row, lanes));
    store_floats<kDtype>(work->out, m * layer->rows + row, lanes, values);
}

inline void finish_any(const bitcore_work *work, int64_t m, int64_t row, __m512i sums) {
    switch (work->layer->dtype) {
        case BITCORE_F32: return finish<BITCORE_F32>(work, m, row, sums);
        case BITCORE_BF16: return finish<BITCORE_BF16>(work, m, row, sums);
        default: return finish<BITCORE_F16>(work, m, row, sums);
    }
}

// One row of inputs. Masked in place, the four columns of a byte are 1, 4, 16 and 64 times their codes: they go
// into sums of their own, and those are shifted once at the end.
template <int kGroups>
inline void one_input(const uint8_t *tile, int64_t steps, const int8_t *codes, __m512i *sums) {
    const __m512i masks[4] = {_mm512_set1_epi8(0x03), _mm512_set1_epi8(0x0c), _mm512_set1_epi8(0x30),
                              _mm512_set1_epi8(char(0xc0))};
    __m512i acc[4][kGroups];
    for (int p = 0; p < 4; ++p)
        for (int g = 0; g < kGroups; ++g) acc[p][g] = _mm512_setzero_si512();
    const int32_t *quads = reinterpret_cast<const int32_t *>(codes);
    for (int64_t s = 0; s < steps; ++s, tile += 64 * kGroups, quads += 4) {
        __m512i packed[kGroups];
        for (int g = 0; g < kGroups; ++g) packed[g] = _mm512_loadu_si512(tile + 64 * g);
        for (int p = 0; p < 4; ++p) {
            const __m512i quad = _mm512_set1_epi32(quads[p]);
            __m512i weights[kGroups];
            for (int g = 0; g < kGroups; ++g) weights[g] = _mm512_and_si512(packed[g], masks[p]);
            for (int g = 0; g < kGroups; ++g) acc[p][g] = _mm512_dpbusd_epi32(acc[p][g], weights[g], quad);
        }
    }
    for (int g = 0; g < kGroups; ++g)
        sums[g] = _mm512_add_epi32(
            _mm512_add_epi32(acc[0][g], _mm512_srai_epi32(acc[1][g], 2)),
            _mm512_add_epi32(_mm512_srai_epi32(acc[2][g], 4), _mm512_srai_epi32(acc[3][g], 6)));
}

template <int kGroups>
inline void one_input_tile(const bitcore_work *work, int64_t tile, const uint8_t *bytes, int64_t m) {
    __m512i sums[kGroups];
    one_input<kGroups>(bytes, work->steps, work->codes + m * work->stride, sums);
    for (int g = 0; g < kGroups; ++g) finish_any(work, m, tile * 64 + 16 * g, sums[g]);
}

}  // namespace
