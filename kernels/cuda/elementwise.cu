// Elementwise ops of the blocks, four numbers a thread, grid-stride; and the fill with random numbers.
#include "common.cuh"

#define FOR_QUADS(i, quads) \
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < (quads); i += size_t(gridDim.x) * blockDim.x)

// The quad of the gate's row for quad `i` of x: one row for each `rows_per_group` rows. In 32 bits, whose division costs a
// fraction of that in 64; the caller sends no more quads than that.
__device__ __forceinline__ const float *gate_at(const float *gate, size_t i, int width, int rows_per_group) {
    const unsigned quad = unsigned(i), row_quads = unsigned(width) >> 2, row = quad / row_quads;
    return gate + size_t(row / unsigned(rows_per_group)) * width + 4 * (quad - row * row_quads);
}

// y = x + gate * h.
template <class X, class H>
__device__ void gated_add(const Stream<X, H> &x, const H *h, const float *gate, X *y, size_t quads, int width, int rows_per_group) {
    FOR_QUADS(i, quads) {
        float4 sum = load4(x.x + 4 * i);
        if (x.h) sum = plus_gated<X>(sum, load4(x.h + 4 * i), load4(gate_at(x.gate, i, width, x.rows_per_gate)));
        if (x.plain) sum = plus<X>(sum, load4(x.plain + 4 * i));
        store4(y + 4 * i, plus_gated<X>(sum, load4(h + 4 * i), load4(gate_at(gate, i, width, rows_per_group))));
    }
}

template <class X, class H> __device__ void add(const X *x, const H *h, X *y, size_t quads) {
    FOR_QUADS(i, quads) store4(y + 4 * i, plus<X>(load4(x + 4 * i), load4(h + 4 * i)));
}

// dh = gate * dy.
template <class X, class H>
__device__ void gated(const X *dy, const float *gate, H *dh, size_t quads, int width, int rows_per_group) {
    FOR_QUADS(i, quads) store4(dh + 4 * i, load4(dy + 4 * i) * load4(gate_at(gate, i, width, rows_per_group)));
}

#define K 0.7978845608028654f  // sqrt(2/pi)
#define C 0.044715f
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + tanhf(K * x * (1.f + C * x * x))); }
__device__ __forceinline__ float gelu_slope(float x) {
    const float t = tanhf(K * x * (1.f + C * x * x));
    return 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * K * (1.f + 3.f * C * x * x);
}

template <class X> __device__ void gelu_forward(const X *x, X *y, size_t quads) {
    FOR_QUADS(i, quads) {
        const float4 v = load4(x + 4 * i);
        store4(y + 4 * i, make_float4(gelu(v.x), gelu(v.y), gelu(v.z), gelu(v.w)));
    }
}

template <class X> __device__ void gelu_backward(const X *x, const X *dy, X *dx, size_t quads) {
    FOR_QUADS(i, quads) {
        const float4 v = load4(x + 4 * i);
        store4(dx + 4 * i, load4(dy + 4 * i) * make_float4(gelu_slope(v.x), gelu_slope(v.y), gelu_slope(v.z), gelu_slope(v.w)));
    }
}

#define TWO(X, XN, H, HN)                                                                                                         \
    extern "C" __global__ void gated_add_##XN##_##HN(const X *x, const H *of_x, const float *gate_of_x, const H *plain,           \
                                                     int rows_per_gate, const H *h, const float *gate, X *y, size_t quads,        \
                                                     int width, int rows_per_group) {                                             \
        const Stream<X, H> stream{x, of_x, gate_of_x, plain, rows_per_gate};                                                      \
        gated_add(stream, h, gate, y, quads, width, rows_per_group);                                                              \
    }                                                                                                                             \
    extern "C" __global__ void add_##XN##_##HN(const X *x, const H *h, X *y, size_t quads) { add(x, h, y, quads); }               \
    extern "C" __global__ void gated_##XN##_##HN(const X *dy, const float *gate, H *dh, size_t quads, int width,                  \
                                                 int rows_per_group) {                                                           \
        gated(dy, gate, dh, quads, width, rows_per_group);                                                                        \
    }
TWO(float, f32, float, f32)
TWO(float, f32, __nv_bfloat16, bf16)
TWO(__nv_bfloat16, bf16, float, f32)
TWO(__nv_bfloat16, bf16, __nv_bfloat16, bf16)
TWO(float, f32, __half, f16)
TWO(__half, f16, float, f32)
TWO(__half, f16, __half, f16)

#define ONE(X, XN)                                                                                                                \
    extern "C" __global__ void gelu_##XN(const X *x, X *y, size_t quads) { gelu_forward(x, y, quads); }                           \
    extern "C" __global__ void gelu_backward_##XN(const X *x, const X *dy, X *dx, size_t quads) { gelu_backward(x, dy, dx, quads); }
ONE(float, f32)
ONE(__nv_bfloat16, bf16)
ONE(__half, f16)
