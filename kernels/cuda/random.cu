// Random numbers as a function of key and counter: Philox 4x32-10, word for word that of src/random.rs.
#include "common.cuh"

__device__ __forceinline__ uint4 philox(uint64_t counter, uint64_t stream, uint64_t seed) {
    uint4 w = make_uint4(uint32_t(counter), uint32_t(counter >> 32), uint32_t(stream), uint32_t(stream >> 32));
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; round++) {
        const uint32_t low0 = 0xD2511F53u * w.x, high0 = __umulhi(0xD2511F53u, w.x);
        const uint32_t low1 = 0xCD9E8D57u * w.z, high1 = __umulhi(0xCD9E8D57u, w.z);
        w = make_uint4(high1 ^ w.y ^ k0, low1, high0 ^ w.w ^ k1, low0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return w;
}

// y = x * (word < threshold ? 0 : keep): the element's own word of the stream. `threshold` is p * 2^32 - 0.5 rounded
// up, so that the comparison is that of the host's (word + 0.5) / 2^32 < p.
template <class X> __device__ void dropout(const X *x, X *y, size_t quads, uint64_t first_block, uint64_t stream, uint64_t seed, uint64_t threshold, float keep) {
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < quads; i += size_t(gridDim.x) * blockDim.x) {
        const uint4 w = philox(first_block + i, stream, seed);
        const float k = rounded<X>(keep);
        const float4 mask = make_float4(w.x < threshold ? 0.f : k, w.y < threshold ? 0.f : k, w.z < threshold ? 0.f : k, w.w < threshold ? 0.f : k);
        store4(y + 4 * i, load4(x + 4 * i) * mask);
    }
}

// Uniform around zero, `width` wide: the upper 24 bits of each word, less a half, times the width.
template <class Y> __device__ void uniform(Y *y, size_t quads, uint64_t stream, uint64_t seed, float width) {
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < quads; i += size_t(gridDim.x) * blockDim.x) {
        const uint4 w = philox(i, stream, seed);
        const float4 u = make_float4(float(w.x >> 8), float(w.y >> 8), float(w.z >> 8), float(w.w >> 8));
        store4(y + 4 * i, (u * (1.f / 16777216.f) + -0.5f) * width);
    }
}

#define RANDOM(X, XN)                                                                                                             \
    extern "C" __global__ void dropout_##XN(const X *x, X *y, size_t quads, uint64_t first_block, uint64_t stream, uint64_t seed, \
                                            uint64_t threshold, float keep) {                                                    \
        dropout(x, y, quads, first_block, stream, seed, threshold, keep);                                                         \
    }                                                                                                                             \
    extern "C" __global__ void uniform_##XN(X *y, size_t quads, uint64_t stream, uint64_t seed, float width) {                    \
        uniform(y, quads, stream, seed, width);                                                                                   \
    }
RANDOM(float, f32)
RANDOM(__nv_bfloat16, bf16)
RANDOM(__half, f16)
