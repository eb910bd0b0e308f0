// What Python calls: rounds activations, and shares tiles of the weight among torch's threads.

#include "ternary.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace {

bool amx_is_permitted() {
#ifdef __linux__
    // Linux gives a process the registers of tiles when it asks; asking twice is harmless.
    const long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

const bitcore_set *set_of(int32_t isa) {
    return isa == BITCORE_AMX ? &bitcore_amx : isa == BITCORE_VNNI ? &bitcore_vnni : &bitcore_avx2;
}

void some_tiles(int64_t begin, int64_t end, void *context) {
    bitcore_work *work = static_cast<bitcore_work *>(context);
    const bitcore_set *set = set_of(work->layer->isa);
    const int64_t bytes = set->scratch_bytes(work);
    void *scratch = bytes ? aligned_alloc(64, bitcore_up(bytes, 64)) : nullptr;
    if (bytes && !scratch) {
        __atomic_store_n(&work->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    set->tiles(work, begin, end, scratch);
    free(scratch);
}

float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace

#define BITCORE_EXPORT __attribute__((visibility("default")))

extern "C" {

// The best instruction set that this processor and system have.
BITCORE_EXPORT int32_t bitcore_best_isa() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return BITCORE_NONE;
    if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
        return BITCORE_AVX2;
    unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
    __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
    const bool has_tiles = (edx >> 24 & 1) && (edx >> 25 & 1);
    return has_tiles && amx_is_permitted() ? BITCORE_AMX : BITCORE_VNNI;
}

// Multiply `inputs` rows of activations by a layer's weight. Returns 0, or 1 where there is no memory.
BITCORE_EXPORT int32_t bitcore_linear(const bitcore_layer *layer, const void *x, int64_t inputs, void *out) {
    if (inputs == 0) return 0;
    const bitcore_set *set = set_of(layer->isa);
    const auto largest_of = set->largest[layer->dtype];
    const auto round_row = set->round_row[layer->dtype];
    const int64_t columns = layer->columns, stride = bitcore_up(columns, BITCORE_BLOCK);
    const int64_t codes_bytes = bitcore_up(inputs * stride, 64);
    char *memory = static_cast<char *>(aligned_alloc(64, bitcore_up(codes_bytes + inputs * 8, 64)));
    if (!memory) return 1;
    int8_t *codes = reinterpret_cast<int8_t *>(memory);
    float *scales = reinterpret_cast<float *>(memory + codes_bytes);
    int32_t *sums = reinterpret_cast<int32_t *>(scales + inputs);
    const int64_t row_bytes = columns * bitcore_size(layer->dtype);
    const char *rows = static_cast<const char *>(x);

    uint32_t largest = layer->per_token ? 0 : largest_of(x, inputs * columns);
    for (int64_t m = 0; m < inputs; ++m) {
        if (layer->per_token) largest = largest_of(rows + m * row_bytes, columns);
        float most = as_float(largest);
        if (most < 1e-5f) most = 1e-5f;
        // Of infinity and NaN nothing is left but that they were there.
        scales[m] = largest >= 0x7f800000u ? as_float(0x7fc00000u) : most / 127.0f;
        int8_t *row = codes + m * stride;
        sums[m] = round_row(rows + m * row_bytes, columns, 1.0f / most * 127.0f, row);
        memset(row + columns, 0, stride - columns);
    }

    bitcore_work work = {layer, inputs, stride, bitcore_up(columns, BITCORE_STEP) / BITCORE_STEP,
                         codes, scales, sums, static_cast<char *>(out), 0};
    const int64_t tiles = (layer->rows + 63) / 64;
    // A thread is worth waking for some ten microseconds of work.
    const int64_t grain = (int64_t(1) << 20) / (64 * columns * (inputs < 4 ? 1 : inputs)) + 1;
    if (!layer->parallel_for || layer->parallel_for(0, tiles, grain, some_tiles, &work) != 0)
        some_tiles(0, tiles, &work);
    free(memory);
    return work.failed;
}

}  // extern "C"
