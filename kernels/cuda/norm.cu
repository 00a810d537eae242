// Norms over the model width, one block a row, the row in registers as f32; widths are multiples of four up to 6144.
#include "common.cuh"

#define THREADS 256  // at most; narrow rows have fewer, as whole warps
#define QUADS 6      // of a thread: 6 * 4 * 256 = 6144 numbers

// A thread's part of a row: each has one quad of every blockDim.x. Quads behind the end are zero, and add nothing to sums of products.
struct Row {
    float4 v[QUADS];
};

#define EACH(q, i, quads) \
    _Pragma("unroll") for (int q = 0, i = threadIdx.x; q < QUADS; q++, i += blockDim.x) if (i < (quads))

template <class X> __device__ __forceinline__ Row load_row(const X *x, int quads) {
    Row row;
    _Pragma("unroll") for (int q = 0; q < QUADS; q++) row.v[q] = make_float4(0.f, 0.f, 0.f, 0.f);
    EACH(q, i, quads) row.v[q] = load4(x + 4 * i);
    return row;
}

template <class X, class H> __device__ __forceinline__ Row load_row(const Stream<X, H> &stream, int width, int quads) {
    const size_t start = size_t(blockIdx.x) * width;
    Row row = load_row(stream.x + start, quads);
    if (stream.h) {
        const float *gate = stream.gate + size_t(blockIdx.x / unsigned(stream.rows_per_gate)) * width;
        EACH(q, i, quads) row.v[q] = plus_gated<X>(row.v[q], load4(stream.h + start + 4 * i), load4(gate + 4 * i));
    }
    if (stream.plain) {
        EACH(q, i, quads) row.v[q] = plus<X>(row.v[q], load4(stream.plain + start + 4 * i));
    }
    return row;
}

// Sums of two numbers over the block, known to every thread; always added in the same order. A block that sums again
// takes another scratch, so that one barrier is enough.
struct Scratch {
    float2 part[THREADS / 32];
};
__device__ __forceinline__ float2 block_sums(float a, float b, Scratch &scratch) {
    for (int offset = 16; offset; offset >>= 1) {
        a += __shfl_xor_sync(0xffffffffu, a, offset);
        b += __shfl_xor_sync(0xffffffffu, b, offset);
    }
    if ((threadIdx.x & 31) == 0) scratch.part[threadIdx.x >> 5] = make_float2(a, b);
    __syncthreads();
    float2 sum = make_float2(0.f, 0.f);
    for (int w = 0; w < blockDim.x / 32; w++) {
        sum.x += scratch.part[w].x;
        sum.y += scratch.part[w].y;
    }
    return sum;
}

// Makes the row normal, (x - mean) / deviation with the mean left out for RMS, and gives 1/deviation.
template <bool CENTRED> __device__ __forceinline__ float normalise(Row &row, int quads, float eps, Scratch *scratch) {
    const float count = float(quads) * 4.f;
    if (CENTRED) {
        float total = 0.f;
        EACH(q, i, quads) total += sum4(row.v[q]);
        const float mean = block_sums(total, 0.f, scratch[0]).x / count;
        EACH(q, i, quads) row.v[q] = row.v[q] + -mean;
    }
    float squares = 0.f;
    EACH(q, i, quads) squares += sum4(row.v[q] * row.v[q]);
    const float inverse = 1.f / sqrtf(block_sums(squares, 0.f, scratch[1]).x / count + eps);
    EACH(q, i, quads) row.v[q] = row.v[q] * inverse;
    return inverse;
}

// y = LN(x) * (one + gain) + shift; gain and shift have one row for each `rows_per_group` rows of x.
template <class X, class Y>
__device__ void layer_norm(const Stream<X, Y> &x, const float *gain, const float *shift, Y *y, int width, int rows_per_group, float one, float eps) {
    __shared__ Scratch scratch[2];
    const int quads = width >> 2;
    const size_t start = size_t(blockIdx.x) * width, group = size_t(blockIdx.x) / rows_per_group * width;
    Row row = load_row(x, width, quads);
    normalise<true>(row, quads, eps, scratch);
    EACH(q, i, quads) store4(y + start + 4 * i, row.v[q] * (load4(gain + group + 4 * i) + one) + load4(shift + group + 4 * i));
}

// dx = onto + (dxh - mean(dxh) - xh mean(dxh xh)) / deviation, with dxh = dy * (one + gain). Gradients of the stream are f32,
// whatever the stream itself is.
template <class X, class DY>
__device__ void layer_norm_backward(const Stream<X, DY> &x, const DY *dy, const float *gain, const float *onto, float *dx, int width, int rows_per_group, float one, float eps) {
    __shared__ Scratch scratch[3];
    const int quads = width >> 2;
    const size_t start = size_t(blockIdx.x) * width, group = size_t(blockIdx.x) / rows_per_group * width;
    Row row = load_row(x, width, quads), d = load_row(dy + start, quads);
    const float inverse = normalise<true>(row, quads, eps, scratch);
    float plain = 0.f, along = 0.f;
    EACH(q, i, quads) {
        d.v[q] = d.v[q] * (load4(gain + group + 4 * i) + one);
        plain += sum4(d.v[q]);
        along += sum4(d.v[q] * row.v[q]);
    }
    const float2 sums = block_sums(plain, along, scratch[2]);
    plain = sums.x / float(width), along = sums.y / float(width);
    EACH(q, i, quads) store4(dx + start + 4 * i, load4(onto + start + 4 * i) + (d.v[q] + -plain - row.v[q] * along) * inverse);
}

// y = round(x / rms) * weight.
template <class X, class Y> __device__ void rms_norm(const X *x, const float *weight, Y *y, int width, float eps) {
    __shared__ Scratch scratch[2];
    const int quads = width >> 2;
    const size_t start = size_t(blockIdx.x) * width;
    Row row = load_row(x + start, quads);
    normalise<false>(row, quads, eps, scratch);
    EACH(q, i, quads) store4(y + start + 4 * i, rounded4<X>(row.v[q]) * load4(weight + 4 * i));
}

// Four numbers are two pairs (a, b), each turned by its own angle: (a cos - b sin, a sin + b cos).
__device__ __forceinline__ float4 turned(float4 v, float2 cos, float2 sin) {
    return make_float4(v.x * cos.x - v.y * sin.x, v.x * sin.x + v.y * cos.x, v.z * cos.y - v.w * sin.y, v.z * sin.y + v.w * cos.y);
}
__device__ __forceinline__ float2 angles(const float *table_lp, size_t token, int quad, int head) {
    return *reinterpret_cast<const float2 *>(table_lp + token * (head >> 1) + ((4 * quad % head) >> 1));
}

// y = turn(round(x / rms) * weight): RMSNorm over the width, then rotary positions in each head.
template <class X>
__device__ void norm_rope(const X *x, const float *weight, const float *cos_lp, const float *sin_lp, X *y, int width, int head, int tokens, float eps) {
    __shared__ Scratch scratch[2];
    const int quads = width >> 2;
    const size_t start = size_t(blockIdx.x) * width, token = blockIdx.x % tokens;
    Row row = load_row(x + start, quads);
    normalise<false>(row, quads, eps, scratch);
    EACH(q, i, quads) {
        const float4 v = rounded4<X>(row.v[q]) * load4(weight + 4 * i);
        store4(y + start + 4 * i, turned(v, angles(cos_lp, token, i, head), angles(sin_lp, token, i, head)));
    }
}

// The gradient of rms_norm, or of norm_rope where the angles are given: dy is turned back first.
template <bool ROPE, class X>
__device__ void rms_norm_backward(const X *x, const X *dy, const float *weight, const float *cos_lp, const float *sin_lp, X *dx, int width, int head, int tokens, float eps) {
    __shared__ Scratch scratch[3];
    const int quads = width >> 2;
    const size_t start = size_t(blockIdx.x) * width, token = ROPE ? blockIdx.x % tokens : 0;
    Row row = load_row(x + start, quads), d = load_row(dy + start, quads);
    const float inverse = normalise<false>(row, quads, eps, scratch);
    float along = 0.f;
    EACH(q, i, quads) {
        if (ROPE) {
            const float2 sin = angles(sin_lp, token, i, head);
            d.v[q] = turned(d.v[q], angles(cos_lp, token, i, head), make_float2(-sin.x, -sin.y));
        }
        d.v[q] = d.v[q] * load4(weight + 4 * i);
        along += sum4(d.v[q] * row.v[q]);
    }
    along = block_sums(along, 0.f, scratch[2]).x / float(width);
    EACH(q, i, quads) store4(dx + start + 4 * i, (d.v[q] - row.v[q] * along) * inverse);
}

#define LAYER_NORM(X, XN, Y, YN)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) layer_norm_##XN##_##YN(                                                 \
        const X *x, const Y *h, const float *gate, const Y *plain, int rows_per_gate, const float *gain, const float *shift, Y *y,\
        int width, int rows_per_group, float one, float eps) {                                                                    \
        layer_norm(Stream<X, Y>{x, h, gate, plain, rows_per_gate}, gain, shift, y, width, rows_per_group, one, eps);              \
    }                                                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS) layer_norm_backward_##XN##_##YN(                                        \
        const X *x, const Y *h, const float *gate, const Y *plain, int rows_per_gate, const Y *dy, const float *gain,             \
        const float *onto, float *dx, int width, int rows_per_group, float one, float eps) {                                            \
        const Stream<X, Y> stream{x, h, gate, plain, rows_per_gate};                                                              \
        layer_norm_backward(stream, dy, gain, onto, dx, width, rows_per_group, one, eps);                                         \
    }                                                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_##XN##_##YN(const X *x, const float *weight, Y *y, int width, float eps) {                \
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
    extern "C" __global__ void __launch_bounds__(THREADS) norm_rope_##XN(const X *x, const float *weight, const float *cos_lp, const float *sin_lp, X *y,    \
                                              int width, int head, int tokens, float eps) {                                      \
        norm_rope(x, weight, cos_lp, sin_lp, y, width, head, tokens, eps);                                                        \
    }                                                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS) norm_rope_backward_##XN(const X *x, const X *dy, const float *weight, const float *cos_lp,         \
                                                       const float *sin_lp, X *dx, int width, int head, int tokens, float eps) { \
        rms_norm_backward<true>(x, dy, weight, cos_lp, sin_lp, dx, width, head, tokens, eps);                                     \
    }                                                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS) rms_norm_backward_##XN(const X *x, const X *dy, const float *weight, X *dx, int width, float eps) {\
        rms_norm_backward<false>(x, dy, weight, (const float *)0, (const float *)0, dx, width, 4, 1, eps);                        \
    }
NORM_ROPE(float, f32)
NORM_ROPE(__nv_bfloat16, bf16)
NORM_ROPE(__half, f16)
