// Ternary weights of 2 bits times activations of 8 bits, on x86-64.
//
// Weights lie in tiles of up to 64 rows (bitcore/packing/tiles.py): [steps of 16 columns][groups of 16 rows][64
// bytes]; the byte of row l and column j of a step holds, at bits 2p, the code plus one of column 4p + j. The
// sum of codes plus one times activations, less the sum of the activations, is the sum of codes times
// activations: that is how a multiplication of unsigned by signed bytes serves.
//
// Each instruction set is a translation unit of its own, compiled with its own flags. Nothing but C is used, so
// that no function of one set can stand for another's.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { BITCORE_F32 = 0, BITCORE_BF16 = 1, BITCORE_F16 = 2 };
enum { BITCORE_NONE = 0, BITCORE_AVX2 = 1, BITCORE_VNNI = 2, BITCORE_AMX = 3 };
enum { BITCORE_GROUP_ROWS = 16, BITCORE_TILE_GROUPS = 4, BITCORE_STEP = 16, BITCORE_BLOCK = 64 };

typedef void (*bitcore_range)(int64_t begin, int64_t end, void *context);
typedef int32_t (*bitcore_parallel_for)(int64_t begin, int64_t end, int64_t grain, bitcore_range, void *);

// What stays the same from call to call; `bitcore/kernels/_native.py` has the same fields in the same order.
struct bitcore_layer {
    const uint8_t *qweight;
    const float *scale;  // [rows]
    const void *bias;    // [rows] in `dtype`, or null
    int64_t rows;
    int64_t columns;
    bitcore_parallel_for parallel_for;  // torch's, or null for one thread
    int32_t dtype;                      // of inputs, bias and outputs
    int32_t per_token;                  // a scale for each row of inputs, or one for all
    int32_t isa;
};

// Activations that were rounded, and where results go.
struct bitcore_work {
    const struct bitcore_layer *layer;
    int64_t inputs;         // rows of activations
    int64_t stride;         // bytes from one of them to the next: columns, padded with zeros to whole blocks
    int64_t steps;
    const int8_t *codes;    // [inputs][stride]
    const float *scales;    // [inputs]
    const int32_t *sums;    // [inputs], of the codes
    char *out;              // [inputs][rows] in the layer's dtype
    int32_t failed;         // set where there was no memory
};

// What an instruction set has.
struct bitcore_set {
    // By dtype: the bits of the largest magnitude; those of NaN are larger than any number's.
    uint32_t (*largest[3])(const void *x, int64_t count);
    // By dtype: round to 8 bits after multiplying; return the sum of what came of it.
    int32_t (*round_row[3])(const void *x, int64_t count, float factor, int8_t *codes);
    // Some tiles of 64 rows; the memory is `scratch_bytes` long.
    void (*tiles)(const struct bitcore_work *, int64_t begin, int64_t end, void *scratch);
    int64_t (*scratch_bytes)(const struct bitcore_work *);
};

extern const struct bitcore_set bitcore_avx2, bitcore_vnni, bitcore_amx;

static inline int64_t bitcore_min(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t bitcore_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

static inline int64_t bitcore_size(int32_t dtype) { return dtype == BITCORE_F32 ? 4 : 2; }

// The bytes and the groups of a tile.
static inline const uint8_t *bitcore_tile(const struct bitcore_work *work, int64_t tile, int *groups) {
    const int64_t per_group = work->steps * BITCORE_BLOCK;
    const int64_t all = bitcore_up(work->layer->rows, BITCORE_GROUP_ROWS) / BITCORE_GROUP_ROWS;
    *groups = (int)bitcore_min(all - tile * BITCORE_TILE_GROUPS, BITCORE_TILE_GROUPS);
    return work->layer->qweight + tile * BITCORE_TILE_GROUPS * per_group;
}
