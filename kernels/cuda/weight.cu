// Frozen weights of one byte a number: decoding to a matrix for the next product, and coding row by row at load time.
#include "common.cuh"

// e4m3fn to f32 by moving the bits; 2^120 mends the exponent, for subnormal numbers too. No hardware conversion: it
// needs compute capability 8.9.
__device__ __forceinline__ float e4m3_value(uint32_t code) {
    const float size = __uint_as_float((code & 0x7fu) << 20) * 1.329227995784916e36f;
    const float number = (code & 0x7fu) == 0x7fu ? __uint_as_float(0x7fc00000u) : size;
    return code & 0x80u ? -number : number;
}

__device__ __forceinline__ uint32_t e4m3_code(float number) {
    const uint32_t sign = (__float_as_uint(number) >> 24) & 0x80u;
    const float size = fabsf(number);
    uint32_t code;
    if (isnan(size)) code = 0x7fu;
    else if (size < 1.f / 64.f) code = uint32_t(rintf(size * 512.f));
    else {
        const uint32_t bits = __float_as_uint(size);
        code = min(((bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20) - (120u << 3), 0x7eu);
    }
    return sign | code;
}

struct E4m3 {
    static constexpr float largest = 448.f;
    static __device__ __forceinline__ float value(uint32_t code) { return e4m3_value(code); }
    static __device__ __forceinline__ uint32_t code(float number) { return e4m3_code(number); }
};
struct Int8 {
    static constexpr float largest = 127.f;
    static __device__ __forceinline__ float value(uint32_t code) { return float(int8_t(code)); }
    static __device__ __forceinline__ uint32_t code(float number) {
        return uint32_t(int(fminf(fmaxf(rintf(number), -127.f), 127.f))) & 0xffu;
    }
};

// Sixteen codes a thread; `each` codes, a multiple of 16, have a scale in common: a row, or a block of one.
template <class Format, class Y> __device__ void decode(const uint8_t *codes, const float *scale, Y *y, size_t sixteens, int each) {
    const size_t scale_sixteens = each >> 4;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < sixteens; i += size_t(gridDim.x) * blockDim.x) {
        const float s = scale[i / scale_sixteens];
        const uint4 raw = reinterpret_cast<const uint4 *>(codes)[i];
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
        for (int w = 0; w < 4; w++) {
            const uint32_t c = words[w];
            store4(y + 16 * i + 4 * w, make_float4(Format::value(c & 0xffu), Format::value((c >> 8) & 0xffu), Format::value((c >> 16) & 0xffu), Format::value(c >> 24)) * s);
        }
    }
}

// One block a row: scale = largest magnitude / largest code, then the codes. The width is a multiple of four.
template <class Format, class X> __device__ void code(const X *x, uint8_t *codes, float *scale, int width) {
    __shared__ float scratch[32];
    const size_t row = blockIdx.x;
    float top = 0.f;
    for (int i = threadIdx.x; i < width / 4; i += blockDim.x) {
        const float4 v = load4(x + row * width + 4 * i);
        top = fmaxf(top, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
    }
    for (int offset = 16; offset; offset >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = top;
    __syncthreads();
    top = 0.f;
    for (int i = 0; i < (blockDim.x + 31) / 32; i++) top = fmaxf(top, scratch[i]);
    const float s = fmaxf(__fdiv_rn(top, Format::largest), 1.17549435e-38f);
    if (threadIdx.x == 0) scale[row] = s;
    for (int i = threadIdx.x; i < width / 4; i += blockDim.x) {
        const float4 v = load4(x + row * width + 4 * i);
        reinterpret_cast<uint32_t *>(codes + row * width)[i] =
            Format::code(__fdiv_rn(v.x, s)) | Format::code(__fdiv_rn(v.y, s)) << 8 | Format::code(__fdiv_rn(v.z, s)) << 16 | Format::code(__fdiv_rn(v.w, s)) << 24;
    }
}

#define WEIGHT(F, FN, Y, YN)                                                                                                      \
    extern "C" __global__ void decode_##FN##_##YN(const uint8_t *codes, const float *scale, Y *y, size_t sixteens, int each) {    \
        decode<F>(codes, scale, y, sixteens, each);                                                                               \
    }                                                                                                                             \
    extern "C" __global__ void code_##FN##_##YN(const Y *x, uint8_t *codes, float *scale, int width) {                            \
        code<F>(x, codes, scale, width);                                                                                          \
    }
WEIGHT(E4m3, e4m3, float, f32)
WEIGHT(E4m3, e4m3, __nv_bfloat16, bf16)
WEIGHT(E4m3, e4m3, __half, f16)
WEIGHT(Int8, int8, float, f32)
WEIGHT(Int8, int8, __nv_bfloat16, bf16)
WEIGHT(Int8, int8, __half, f16)
