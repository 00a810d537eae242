// Softmax over rows of attention scores, one block a row.
#include "common.cuh"

#define THREADS 256

// The largest of the block's numbers, or their sum, known to every thread; always taken in the same order.
template <bool SUM> __device__ __forceinline__ float over_block(float v, float *scratch) {
    for (int offset = 16; offset; offset >>= 1) {
        const float other = __shfl_xor_sync(0xffffffffu, v, offset);
        v = SUM ? v + other : fmaxf(v, other);
    }
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
    __syncthreads();
    v = scratch[0];
    for (int w = 1; w < THREADS / 32; w++) v = SUM ? v + scratch[w] : fmaxf(v, scratch[w]);
    return v;
}

__device__ __forceinline__ float max4(float4 v) { return fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)); }
__device__ __forceinline__ float4 exp4(float4 v) { return make_float4(expf(v.x), expf(v.y), expf(v.z), expf(v.w)); }

// y = exp(scale x - lse), lse the logarithm of the sum of exp(scale x) over the row.
template <class X> __device__ __forceinline__ void softmax(const X *x, X *y, float *lse, int width, float scale) {
    __shared__ float tops[THREADS / 32], totals[THREADS / 32];
    const size_t start = size_t(blockIdx.x) * width;
    // Of the numbers seen so far: the largest, and the sum of exp(v - largest).
    float top = -INFINITY, total = 0.f;
    for (int i = 4 * threadIdx.x; i < width; i += 4 * THREADS) {
        const float4 v = load4(x + start + i) * scale;
        const float higher = fmaxf(top, max4(v));
        total = total * expf(top - higher) + sum4(exp4(v + -higher));
        top = higher;
    }
    const float highest = over_block<false>(top, tops);
    const float sum = over_block<true>(total * expf(top - highest), totals);
    for (int i = 4 * threadIdx.x; i < width; i += 4 * THREADS)
        store4(y + start + i, exp4(load4(x + start + i) * scale + -highest) * (1.f / sum));
    if (threadIdx.x == 0) lse[blockIdx.x] = highest + logf(sum);
}

#define SOFTMAX(X, XN)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) softmax_##XN(const X *x, X *y, float *lse, int width, float scale) { \
        softmax(x, y, lse, width, scale);                                                                                     \
    }
SOFTMAX(float, f32)
SOFTMAX(__nv_bfloat16, bf16)
SOFTMAX(__half, f16)
