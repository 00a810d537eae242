// Norms over the model width, one block a row, the row held in shared memory as f32; widths are multiples of four.
#include "common.cuh"

extern __shared__ float4 row_cache[];

// Loads a row into the cache and gives its mean (0 for RMS) and 1/deviation.
template <bool CENTRED, class X>
__device__ __forceinline__ void statistics(const X *x, int quads, float eps, float *scratch, float &mean, float &inverse) {
    const float count = float(quads) * 4.f;
    float total = 0.f;
    for (int i = threadIdx.x; i < quads; i += blockDim.x) {
        const float4 v = load4(x + 4 * i);
        row_cache[i] = v;
        total += CENTRED ? sum4(v) : sum4(v * v);
    }
    total = block_sum(total, scratch);
    mean = 0.f;
    if (CENTRED) {
        mean = total / count;
        float squares = 0.f;
        for (int i = threadIdx.x; i < quads; i += blockDim.x) {
            const float4 v = row_cache[i] + -mean;
            squares += sum4(v * v);
        }
        total = block_sum(squares, scratch);
    }
    inverse = 1.f / sqrtf(total / count + eps);
}

// y = LN(x) * (one + gain) + shift; gain and shift have one row for each `rows_per_group` rows of x.
template <class X, class Y>
__device__ void layer_norm(const X *x, const float *gain, const float *shift, Y *y, int width, int rows_per_group, float one, float eps) {
    __shared__ float scratch[33];
    const int quads = width >> 2;
    const size_t row = blockIdx.x, group = row / rows_per_group;
    float mean, inverse;
    statistics<true>(x + row * width, quads, eps, scratch, mean, inverse);
    for (int i = threadIdx.x; i < quads; i += blockDim.x) {
        const float4 g = load4(gain + group * width + 4 * i) + one;
        const float4 normal = (row_cache[i] + -mean) * inverse;
        store4(y + row * width + 4 * i, normal * g + load4(shift + group * width + 4 * i));
    }
}

// dx = onto + ((dxh - mean(dxh) - xh mean(dxh xh)) * inverse, with dxh = dy * (one + gain).
template <class X, class DY>
__device__ void layer_norm_backward(const X *x, const DY *dy, const float *gain, const X *onto, X *dx, int width, int rows_per_group, float one, float eps) {
    __shared__ float scratch[33];
    const int quads = width >> 2;
    const size_t row = blockIdx.x, group = row / rows_per_group;
    float mean, inverse;
    statistics<true>(x + row * width, quads, eps, scratch, mean, inverse);
    float plain = 0.f, along = 0.f;
    for (int i = threadIdx.x; i < quads; i += blockDim.x) {
        const float4 d = load4(dy + row * width + 4 * i) * (load4(gain + group * width + 4 * i) + one);
        plain += sum4(d);
        along += sum4(d * ((row_cache[i] + -mean) * inverse));
    }
    plain = block_sum(plain, scratch) / float(width);
    along = block_sum(along, scratch) / float(width);
    for (int i = threadIdx.x; i < quads; i += blockDim.x) {
        const float4 d = load4(dy + row * width + 4 * i) * (load4(gain + group * width + 4 * i) + one);
        const float4 normal = (row_cache[i] + -mean) * inverse;
        const float4 back = (d + -plain - normal * along) * inverse;
        store4(dx + row * width + 4 * i, load4(onto + row * width + 4 * i) + back);
    }
}

// y = round(x / rms) * weight.
template <class X, class Y>
__device__ void rms_norm(const X *x, const float *weight, Y *y, int width, float eps) {
    __shared__ float scratch[33];
    const int quads = width >> 2;
    const size_t row = blockIdx.x;
    float mean, inverse;
    statistics<false>(x + row * width, quads, eps, scratch, mean, inverse);
    for (int i = threadIdx.x; i < quads; i += blockDim.x)
        store4(y + row * width + 4 * i, rounded4<X>(row_cache[i] * inverse) * load4(weight + 4 * i));
}

// Four numbers are two pairs (a, b), each turned by its own angle: (a cos - b sin, a sin + b cos).
__device__ __forceinline__ float4 turned(float4 v, float2 cos, float2 sin) {
    return make_float4(v.x * cos.x - v.y * sin.x, v.x * sin.x + v.y * cos.x, v.z * cos.y - v.w * sin.y, v.z * sin.y + v.w * cos.y);
}

// y = turn(round(x / rms) * weight): RMSNorm over the width, then rotary positions in each head.
template <class X>
__device__ void norm_rope(const X *x, const float *weight, const float *cos_lp, const float *sin_lp, X *y, int width, int head, int tokens, float eps) {
    __shared__ float scratch[33];
    const int quads = width >> 2, pairs = head >> 1;
    const size_t row = blockIdx.x, token = row % tokens;
    float mean, inverse;
    statistics<false>(x + row * width, quads, eps, scratch, mean, inverse);
    for (int i = threadIdx.x; i < quads; i += blockDim.x) {
        const int pair = (4 * i % head) >> 1;
        const float2 cos = *reinterpret_cast<const float2 *>(cos_lp + token * pairs + pair);
        const float2 sin = *reinterpret_cast<const float2 *>(sin_lp + token * pairs + pair);
        store4(y + row * width + 4 * i, turned(rounded4<X>(row_cache[i] * inverse) * load4(weight + 4 * i), cos, sin));
    }
}

// The gradient of rms_norm, or of norm_rope where the angles are given: dy is turned back first.
template <bool ROPE, class X>
__device__ void rms_norm_backward(const X *x, const X *dy, const float *weight, const float *cos_lp, const float *sin_lp, X *dx, int width, int head, int tokens, float eps) {
    __shared__ float scratch[33];
    const int quads = width >> 2, pairs = head >> 1;
    const size_t row = blockIdx.x, token = ROPE ? row % tokens : 0;
    float4 *turned_back = row_cache + quads;
    float mean, inverse;
    statistics<false>(x + row * width, quads, eps, scratch, mean, inverse);
    float along = 0.f;
    for (int i = threadIdx.x; i < quads; i += blockDim.x) {
        float4 d = load4(dy + row * width + 4 * i);
        if (ROPE) {
            const int pair = (4 * i % head) >> 1;
            const float2 cos = *reinterpret_cast<const float2 *>(cos_lp + token * pairs + pair);
            const float2 sin = *reinterpret_cast<const float2 *>(sin_lp + token * pairs + pair);
            d = turned(d, cos, make_float2(-sin.x, -sin.y));
        }
        d = d * load4(weight + 4 * i);
        turned_back[i] = d;
        along += sum4(d * (row_cache[i] * inverse));
    }
    along = block_sum(along, scratch) / float(width);
    for (int i = threadIdx.x; i < quads; i += blockDim.x)
        store4(dx + row * width + 4 * i, (turned_back[i] - row_cache[i] * (inverse * along)) * inverse);
}

#define LAYER_NORM(X, XN, Y, YN)                                                                                                  \
    extern "C" __global__ void layer_norm_##XN##_##YN(const X *x, const float *gain, const float *shift, Y *y, int width,         \
                                                      int rows_per_group, float one, float eps) {                                \
        layer_norm(x, gain, shift, y, width, rows_per_group, one, eps);                                                           \
    }                                                                                                                             \
    extern "C" __global__ void layer_norm_backward_##XN##_##YN(const X *x, const Y *dy, const float *gain, const X *onto, X *dx,  \
                                                               int width, int rows_per_group, float one, float eps) {            \
        layer_norm_backward(x, dy, gain, onto, dx, width, rows_per_group, one, eps);                                              \
    }                                                                                                                             \
    extern "C" __global__ void rms_norm_##XN##_##YN(const X *x, const float *weight, Y *y, int width, float eps) {                \
        rms_norm(x, weight, y, width, eps);                                                                                       \
    }
LAYER_NORM(float, f32, float, f32)
LAYER_NORM(float, f32, __nv_bfloat16, bf16)
LAYER_NORM(__nv_bfloat16, bf16, float, f32)
LAYER_NORM(__nv_bfloat16, bf16, __nv_bfloat16, bf16)
LAYER_NORM(float, f32, __half, f16)
LAYER_NORM(__half, f16, float, f32)
LAYER_NORM(__half, f16, __half, f16)

#define NORM_ROPE(X, XN)                                                                                                          \
    extern "C" __global__ void norm_rope_##XN(const X *x, const float *weight, const float *cos_lp, const float *sin_lp, X *y,    \
                                              int width, int head, int tokens, float eps) {                                      \
        norm_rope(x, weight, cos_lp, sin_lp, y, width, head, tokens, eps);                                                        \
    }                                                                                                                             \
    extern "C" __global__ void norm_rope_backward_##XN(const X *x, const X *dy, const float *weight, const float *cos_lp,         \
                                                       const float *sin_lp, X *dx, int width, int head, int tokens, float eps) { \
        rms_norm_backward<true>(x, dy, weight, cos_lp, sin_lp, dx, width, head, tokens, eps);                                     \
    }                                                                                                                             \
    extern "C" __global__ void rms_norm_backward_##XN(const X *x, const X *dy, const float *weight, X *dx, int width, float eps) {\
        rms_norm_backward<false>(x, dy, weight, (const float *)0, (const float *)0, dx, width, 4, 1, eps);                        \
    }
NORM_ROPE(float, f32)
NORM_ROPE(__nv_bfloat16, bf16)
NORM_ROPE(__half, f16)
