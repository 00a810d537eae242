// Rotation of groups of 4, 16, 64 or 256 numbers by a Hadamard matrix, as `rotate` of int8.rs: the same steps in the same order.
#pragma once
#include "common.cuh"

// The regular Hadamard matrix of order 4 times a vector: y[p] = (x0 + x1 + x2 + x3) - 2 x[3 - p]; symmetric, and its own inverse up to
// a factor of 4. Of a group of 4^n numbers it is applied at strides 1, 4, 16, 64, in this order, here and on the CPU.
__device__ __forceinline__ void turn4(float &a, float &b, float &c, float &d) {
    const float sum = (a + b) + (c + d);
    const float p = sum - 2.f * d, q = sum - 2.f * c, r = sum - 2.f * b, s = sum - 2.f * a;
    a = p, b = q, c = r, d = s;
}
// 1 / sqrt(group), which is exact.
__device__ __forceinline__ float turn_scale(int group) { return group == 256 ? 0.0625f : group == 64 ? 0.125f : group == 16 ? 0.25f : group == 4 ? 0.5f : 1.f; }

#define LINE 16  // consecutive numbers of a thread; sixteen threads share a group of 256

// Strides 1 and 4 of sixteen consecutive numbers; 16 and 64, and the factor, of sixteen that are sixteen apart.
__device__ __forceinline__ void turn_near(float (&v)[LINE], int group) {
    if (group >= 4) {
#pragma unroll
        for (int i = 0; i < LINE; i += 4) turn4(v[i], v[i + 1], v[i + 2], v[i + 3]);
    }
    if (group >= 16) {
#pragma unroll
        for (int i = 0; i < 4; i++) turn4(v[i], v[i + 4], v[i + 8], v[i + 12]);
    }
}
__device__ __forceinline__ void turn_far(float (&v)[LINE], int group) {
    if (group >= 64) {
#pragma unroll
        for (int i = 0; i < LINE; i += 4) turn4(v[i], v[i + 1], v[i + 2], v[i + 3]);
    }
    if (group >= 256) {
#pragma unroll
        for (int i = 0; i < 4; i++) turn4(v[i], v[i + 4], v[i + 8], v[i + 12]);
    }
    const float factor = turn_scale(group);
#pragma unroll
    for (int i = 0; i < LINE; i++) v[i] *= factor;
}

// Rotates the groups that sixteen threads have a line each of. Afterwards a thread has every sixteenth number of the group instead of
// sixteen consecutive ones.
__device__ __forceinline__ void turn_line(float (&v)[LINE], float *exchange, int group) {
    const int lane = threadIdx.x & 15;
    turn_near(v, group);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < LINE; i++) exchange[lane * 17 + i] = v[i];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < LINE; i++) v[i] = exchange[i * 17 + lane];
    turn_far(v, group);
}

// y = each column of x [rows, width] rotated in groups. 512 threads have 32 columns of 256 rows.
template <class X, class Y> __device__ void turn_columns(const X *x, Y *y, int rows, int width, int group) {
    __shared__ float exchange[256 * 33];
    const int tiles = (width + 31) / 32, lane = threadIdx.x & 31, line = threadIdx.x >> 5;
    const int column = blockIdx.x % tiles * 32 + lane, row = blockIdx.x / tiles * 256;
    float v[LINE];
#pragma unroll
    for (int i = 0; i < LINE; i++) {
        const int m = row + line * LINE + i;
        v[i] = m < rows && column < width ? float(x[size_t(m) * width + column]) : 0.f;
    }
    turn_near(v, group);
#pragma unroll
    for (int i = 0; i < LINE; i++) exchange[(line * LINE + i) * 33 + lane] = v[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < LINE; i++) v[i] = exchange[(i * LINE + line) * 33 + lane];
    turn_far(v, group);
#pragma unroll
    for (int i = 0; i < LINE; i++) {
        const int m = row + i * LINE + line;
        if (m < rows && column < width) y[size_t(m) * width + column] = narrow<Y>(v[i]);
    }
}
