// AVX-512 with VNNI.

#include "rows512.h"

namespace {

constexpr int kInputs = 6;  // 24 sums, four weights and one quad of activations fill the registers.

// Several rows of inputs at once. The columns of a byte are taken from the last to the first, each in a pass of its
// own: masked in place they are 64, 16, 4 and 1 times their codes, and the sums are shifted between the passes, so
// that the innermost loop has no shifts.
template <int kGroups, int kRows>
void some_inputs(const bitcore_work *work, int64_t tile, const uint8_t *bytes, int64_t m) {
    __m512i acc[kRows][kGroups];
    for (int r = 0; r < kRows; ++r)
        for (int g = 0; g < kGroups; ++g) acc[r][g] = _mm512_setzero_si512();
    for (int p = 3; p >= 0; --p) {
        const __m512i mask = _mm512_set1_epi8(char(3 << 2 * p));
        const int8_t *codes = work->codes + m * work->stride + 4 * p;
        const uint8_t *step = bytes;
        for (int64_t s = 0; s < work->steps; ++s, step += 64 * kGroups, codes += 16) {
            __m512i weights[kGroups];
            for (int g = 0; g < kGroups; ++g) weights[g] = _mm512_and_si512(_mm512_loadu_si512(step + 64 * g), mask);
            for (int r = 0; r < kRows; ++r) {
                int32_t quad;
                memcpy(&quad, codes + r * work->stride, 4);
                for (int g = 0; g < kGroups; ++g)
                    acc[r][g] = _mm512_dpbusd_epi32(acc[r][g], weights[g], _mm512_set1_epi32(quad));
            }
        }
        if (p)
            for (int r = 0; r < kRows; ++r)
                for (int g = 0; g < kGroups; ++g) acc[r][g] = _mm512_srai_epi32(acc[r][g], 2);
    }
    for (int r = 0; r < kRows; ++r)
        for (int g = 0; g < kGroups; ++g) finish_any(work, m + r, tile * 64 + 16 * g, acc[r][g]);
}

template <int kGroups>
void tile_of(const bitcore_work *work, int64_t tile, const uint8_t *bytes) {
    int64_t m = 0;
    for (; m + kInputs <= work->inputs; m += kInputs) some_inputs<kGroups, kInputs>(work, tile, bytes, m);
    for (; m + 2 <= work->inputs; m += 2) some_inputs<kGroups, 2>(work, tile, bytes, m);
    for (; m < work->inputs; ++m) one_input_tile<kGroups>(work, tile, bytes, m);
}

void tiles(const bitcore_work *work, int64_t begin, int64_t end, void *) {
    for (int64_t tile = begin; tile < end; ++tile) {
        int groups;
        const uint8_t *bytes = bitcore_tile(work, tile, &groups);
        switch (groups) {
            case 1: tile_of<1>(work, tile, bytes); break;
            case 2: tile_of<2>(work, tile, bytes); break;
            case 3: tile_of<3>(work, tile, bytes); break;
            default: tile_of<4>(work, tile, bytes);
        }
    }
}

int64_t scratch_bytes(const bitcore_work *) { return 0; }

}  // namespace

const bitcore_set bitcore_vnni = {
    {largest_of<BITCORE_F32>, largest_of<BITCORE_BF16>, largest_of<BITCORE_F16>},
    {round_floats<BITCORE_F32>, round_floats<BITCORE_BF16>, round_floats<BITCORE_F16>},
    tiles,
    scratch_bytes,
};
