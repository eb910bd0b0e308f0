// AMX: matrices of 16 rows of inputs by 64 columns, times 64 columns by 16 rows of the weight.

#include "rows512.h"

namespace {

constexpr int kRows = 16;              // of a matrix register
constexpr int kBytes = 64;             // in its rows, which are also the columns of a block
constexpr int kMatrix = kRows * kBytes;
constexpr int kSteps = kBytes / BITCORE_STEP;

// Registers 0 to 3 hold sums, 4 and 5 inputs, 6 and 7 weights.
struct alignas(64) Shapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Sums in pairs: registers 0 and 1 belong to the first 16 inputs, 2 and 3 to those that follow.
void set_shapes(int first, int second) {
    Shapes shapes;
    const int rows[8] = {first, first, second, second, first, second, kRows, kRows};
    for (int i = 0; i < 8; ++i) {
        shapes.rows[i] = uint8_t(rows[i] ? rows[i] : 1);
        shapes.row_bytes[i] = kBytes;
    }
    _tile_loadconfig(&shapes);
}

inline void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// The codes of 16 rows and 64 columns of the weight, one byte each, as a matrix register takes them.
inline void unpack(const uint8_t *bytes, int64_t apart, int steps, uint8_t *matrix) {
    const __m512i low = _mm512_set1_epi8(0x03);
    for (int s = 0; s < steps; ++s, bytes += apart, matrix += 4 * kBytes) {
        const __m512i packed = _mm512_loadu_si512(bytes);
        _mm512_store_si512(matrix, _mm512_and_si512(packed, low));
        _mm512_store_si512(matrix + kBytes, _mm512_and_si512(_mm512_srli_epi16(packed, 2), low));
        _mm512_store_si512(matrix + 2 * kBytes, _mm512_and_si512(_mm512_srli_epi16(packed, 4), low));
        _mm512_store_si512(matrix + 3 * kBytes, _mm512_and_si512(_mm512_srli_epi16(packed, 6), low));
    }
}

void finish_matrix(const bitcore_work *work, const int32_t *sums, int64_t m, int count, int64_t row) {
    if (row >= work->layer->rows) return;
    for (int r = 0; r < count; ++r) finish_any(work, m + r, row, _mm512_load_si512(sums + 16 * r));
}

// All blocks of a tile's groups, one after another, for every 32 rows of inputs.
void tile_of(const bitcore_work *work, int64_t tile, uint8_t *panel) {
    int groups;
    const uint8_t *bytes = bitcore_tile(work, tile, &groups);
    const int64_t blocks = work->stride / kBytes;
    for (int g = 0; g < groups; ++g)
        for (int64_t b = 0; b < blocks; ++b) {
            const int steps = int(bitcore_min(work->steps - b * kSteps, kSteps));
            unpack(bytes + (b * kSteps * groups + g) * kBytes, groups * kBytes, steps, panel + (g * blocks + b) * kMatrix);
        }
    alignas(64) int32_t sums[kRows * 16];
    int shape = 0;
    for (int64_t m = 0; m < work->inputs; m += 2 * kRows) {
        const int count = int(bitcore_min(work->inputs - m, 2 * kRows));
        const int first = count < kRows ? count : kRows, second = count - first;
        if (shape != count) set_shapes(first, second);
        shape = count;
        const int8_t *upper = work->codes + m * work->stride, *lower = upper + kRows * work->stride;
        for (int g = 0; g < groups; g += 2) {
            const uint8_t *left = panel + g * blocks * kMatrix;
            const uint8_t *right = g + 1 < groups ? left + blocks * kMatrix : left;
            clear_sums();
            if (second) {
                for (int64_t b = 0; b < blocks; ++b) {
                    _tile_loadd(4, upper + b * kBytes, work->stride);
                    _tile_loadd(6, left + b * kMatrix, kBytes);
                    _tile_dpbsud(0, 4, 6);
                    _tile_loadd(5, lower + b * kBytes, work->stride);
                    _tile_dpbsud(2, 5, 6);
                    _tile_loadd(7, right + b * kMatrix, kBytes);
                    _tile_dpbsud(1, 4, 7);
                    _tile_dpbsud(3, 5, 7);
                }
            } else {
                for (int64_t b = 0; b < blocks; ++b) {
                    _tile_loadd(4, upper + b * kBytes, work->stride);
                    _tile_loadd(6, left + b * kMatrix, kBytes);
                    _tile_dpbsud(0, 4, 6);
                    _tile_loadd(7, right + b * kMatrix, kBytes);
                    _tile_dpbsud(1, 4, 7);
                }
            }
            const int64_t row = tile * 64 + g * 16;
            _tile_stored(0, sums, 64);
            finish_matrix(work, sums, m, first, row);
            if (second) {
                _tile_stored(2, sums, 64);
                finish_matrix(work, sums, m + kRows, second, row);
            }
            if (g + 1 == groups) continue;
            _tile_stored(1, sums, 64);
            finish_matrix(work, sums, m, first, row + 16);
            if (second) {
                _tile_stored(3, sums, 64);
                finish_matrix(work, sums, m + kRows, second, row + 16);
            }
        }
    }
}

// Up to 16 rows of inputs: blocks are unpacked when they are needed, while those before are multiplied.
void thin_tile_of(const bitcore_work *work, int64_t tile, uint8_t *buffer) {
    int groups;
    const uint8_t *bytes = bitcore_tile(work, tile, &groups);
    const int64_t blocks = work->stride / kBytes;
    const int count = int(work->inputs);
    clear_sums();
    for (int64_t b = 0; b <= blocks; ++b) {
        if (b < blocks) {
            const int steps = int(bitcore_min(work->steps - b * kSteps, kSteps));
            for (int g = 0; g < groups; ++g)
                unpack(bytes + (b * kSteps * groups + g) * kBytes, groups * kBytes, steps,
                       buffer + ((b & 1) * BITCORE_TILE_GROUPS + g) * kMatrix);
        }
        if (b == 0) continue;
        const uint8_t *ready = buffer + ((b - 1) & 1) * BITCORE_TILE_GROUPS * kMatrix;
        _tile_loadd(4, work->codes + (b - 1) * kBytes, work->stride);
        _tile_loadd(6, ready, kBytes);
        _tile_dpbsud(0, 4, 6);
        if (groups > 1) {
            _tile_loadd(7, ready + kMatrix, kBytes);
            _tile_dpbsud(1, 4, 7);
        }
        if (groups > 2) {
            _tile_loadd(6, ready + 2 * kMatrix, kBytes);
            _tile_dpbsud(2, 4, 6);
        }
        if (groups > 3) {
            _tile_loadd(7, ready + 3 * kMatrix, kBytes);
            _tile_dpbsud(3, 4, 7);
        }
    }
    alignas(64) int32_t sums[kRows * 16];
    _tile_stored(0, sums, 64);
    finish_matrix(work, sums, 0, count, tile * 64);
    _tile_stored(1, sums, 64);
    finish_matrix(work, sums, 0, count, tile * 64 + 16);
    _tile_stored(2, sums, 64);
    finish_matrix(work, sums, 0, count, tile * 64 + 32);
    _tile_stored(3, sums, 64);
    finish_matrix(work, sums, 0, count, tile * 64 + 48);
}

void tiles(const bitcore_work *work, int64_t begin, int64_t end, void *scratch) {
    if (work->inputs == 1) {
        // One row would leave fifteen sixteenths of a matrix unused.
        bitcore_vnni.tiles(work, begin, end, scratch);
        return;
    }
    uint8_t *panel = static_cast<uint8_t *>(scratch);
    if (work->inputs <= kRows) set_shapes(int(work->inputs), int(work->inputs));
    for (int64_t tile = begin; tile < end; ++tile) {
        if (work->inputs <= kRows) thin_tile_of(work, tile, panel);
        else tile_of(work, tile, panel);
    }
    _tile_release();
}

int64_t scratch_bytes(const bitcore_work *work) {
    if (work->inputs == 1) return 0;
    return BITCORE_TILE_GROUPS * kMatrix * (work->inputs <= kRows ? 2 : work->stride / kBytes);
}

}  // namespace

const bitcore_set bitcore_amx = {
    {largest_of<BITCORE_F32>, largest_of<BITCORE_BF16>, largest_of<BITCORE_F16>},
    {round_floats<BITCORE_F32>, round_floats<BITCORE_BF16>, round_floats<BITCORE_F16>},
    tiles,
    scratch_bytes,
};
