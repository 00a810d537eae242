// What the kernels share: four numbers at a time from and to any of the dtypes.
//
// Everything is computed in f32. The suffixes of kernel names are the dtypes of their tensors: f32, bf16, f16.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

struct alignas(8) Half4 { uint32_t lo, hi; };

__device__ __forceinline__ float4 load4(const float *p) { return *reinterpret_cast<const float4 *>(p); }
__device__ __forceinline__ float4 load4(const __nv_bfloat16 *p) {
    const Half4 raw = *reinterpret_cast<const Half4 *>(p);
    return make_float4(__uint_as_float(raw.lo << 16), __uint_as_float(raw.lo & 0xffff0000u),
                       __uint_as_float(raw.hi << 16), __uint_as_float(raw.hi & 0xffff0000u));
}
__device__ __forceinline__ float4 load4(const __half *p) {
    const Half4 raw = *reinterpret_cast<const Half4 *>(p);
    const float2 a = __half22float2(*reinterpret_cast<const __half2 *>(&raw.lo));
    const float2 b = __half22float2(*reinterpret_cast<const __half2 *>(&raw.hi));
    return make_float4(a.x, a.y, b.x, b.y);
}

__device__ __forceinline__ void store4(float *p, float4 v) { *reinterpret_cast<float4 *>(p) = v; }
__device__ __forceinline__ void store4(__nv_bfloat16 *p, float4 v) {
    const __nv_bfloat162 a = __floats2bfloat162_rn(v.x, v.y), b = __floats2bfloat162_rn(v.z, v.w);
    Half4 raw;
    raw.lo = *reinterpret_cast<const uint32_t *>(&a);
    raw.hi = *reinterpret_cast<const uint32_t *>(&b);
    *reinterpret_cast<Half4 *>(p) = raw;
}
__device__ __forceinline__ void store4(__half *p, float4 v) {
    const __half2 a = __floats2half2_rn(v.x, v.y), b = __floats2half2_rn(v.z, v.w);
    Half4 raw;
    raw.lo = *reinterpret_cast<const uint32_t *>(&a);
    raw.hi = *reinterpret_cast<const uint32_t *>(&b);
    *reinterpret_cast<Half4 *>(p) = raw;
}

// A number rounded to T and back.
template <class T> __device__ __forceinline__ float rounded(float v);
template <> __device__ __forceinline__ float rounded<float>(float v) { return v; }
template <> __device__ __forceinline__ float rounded<__nv_bfloat16>(float v) { return __bfloat162float(__float2bfloat16_rn(v)); }
template <> __device__ __forceinline__ float rounded<__half>(float v) { return __half2float(__float2half_rn(v)); }
template <class T> __device__ __forceinline__ float4 rounded4(float4 v) {
    return make_float4(rounded<T>(v.x), rounded<T>(v.y), rounded<T>(v.z), rounded<T>(v.w));
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
__device__ __forceinline__ float4 operator-(float4 a, float4 b) { return make_float4(a.x - b.x, a.y - b.y, a.z - b.z, a.w - b.w); }
__device__ __forceinline__ float4 operator*(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }
__device__ __forceinline__ float4 operator*(float4 a, float s) { return make_float4(a.x * s, a.y * s, a.z * s, a.w * s); }
__device__ __forceinline__ float4 operator+(float4 a, float s) { return make_float4(a.x + s, a.y + s, a.z + s, a.w + s); }
__device__ __forceinline__ float sum4(float4 v) { return (v.x + v.y) + (v.z + v.w); }

__device__ __forceinline__ float wide(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float wide(__half v) { return __half2float(v); }
__device__ __forceinline__ float wide(float v) { return v; }
template <class X> __device__ __forceinline__ X narrow(float v);
template <> __device__ __forceinline__ __nv_bfloat16 narrow(float v) { return __float2bfloat16_rn(v); }
template <> __device__ __forceinline__ __half narrow(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ float narrow(float v) { return v; }

// The residual stream before its sums are made: x + gate h + plain, what is null left out. A row of the gate serves
// `rows_per_gate` rows of x. Each sum is rounded as it would be where it is stored.
template <class X, class H> struct Stream {
    const X *x;
    const H *h;
    const float *gate;
    const H *plain;
    int rows_per_gate;
};

// The two sums of the stream, as they would be stored.
template <class X> __device__ __forceinline__ float4 plus_gated(float4 sum, float4 h, float4 gate) {
    return rounded4<X>(sum + rounded4<X>(h * gate));
}
template <class X> __device__ __forceinline__ float4 plus(float4 sum, float4 h) { return rounded4<X>(sum + rounded4<X>(h)); }
