// What stands between the convolutions over video. In memory the channels of a pixel lie side by side, [b, t, h, w, c].
#include "common.cuh"

// Planes of channels into channels side by side, [b, c, n] -> [b, n, padded], zeros behind the last; 32 x 32 a block.
template <class X> __device__ __forceinline__ void to_rows(const X *x, X *y, int channels, int padded, size_t n) {
    __shared__ X tile[32][33];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const size_t across = (padded + 31) / 32, down = (n + 31) / 32;
    const int c0 = int(blockIdx.x % across) * 32;
    const size_t n0 = blockIdx.x / across % down * 32, b = blockIdx.x / across / down;
    for (int i = warp; i < 32; i += 8) {
        const bool is_inside = c0 + i < channels && n0 + lane < n;
        tile[i][lane] = is_inside ? x[(b * channels + c0 + i) * n + n0 + lane] : narrow<X>(0.f);
    }
    __syncthreads();
    for (int i = warp; i < 32; i += 8)
        if (c0 + lane < padded && n0 + i < n) y[(b * n + n0 + i) * padded + c0 + lane] = tile[lane][i];
}

// y = activation(x / max(|x|, 1e-12) sqrt(C) gamma) of rows of C channels; `lanes` threads of a warp have a row.
template <class X>
__device__ __forceinline__ void channel_norm(const X *x, const X *gamma, X *y, size_t rows, int channels, int lanes, int is_silu) {
    const size_t row = size_t(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
    const int first = threadIdx.x % lanes * 4;
    const bool is_row = row < rows;
    const X *from = x + (is_row ? row : 0) * channels;
    float squares = 0.f;
    for (int c = first; c < channels; c += lanes * 4) {
        const float4 v = load4(from + c);
        squares += sum4(v * v);
    }
    for (int offset = lanes >> 1; offset; offset >>= 1) squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    if (!is_row) return;
    const float scale = sqrtf(float(channels)) / fmaxf(sqrtf(squares), 1e-12f);
    for (int c = first; c < channels; c += lanes * 4) {
        float4 v = load4(from + c) * load4(gamma + c) * scale;
        if (is_silu) v = make_float4(v.x / (1.f + __expf(-v.x)), v.y / (1.f + __expf(-v.y)), v.z / (1.f + __expf(-v.z)), v.w / (1.f + __expf(-v.w)));
        store4(y + row * channels + c, v);
    }
}

// Each pixel four times, [n, h, w, c] -> [n, 2h, 2w, c], four channels a thread.
template <class X> __device__ __forceinline__ void twice(const X *x, X *y, size_t quads, int channels, int height, int width) {
    const size_t row_quads = channels >> 2;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < quads; i += size_t(gridDim.x) * blockDim.x) {
        const size_t pixel = i / row_quads, column = pixel % (2 * width), rest = pixel / (2 * width);
        const size_t line = rest % (2 * height), picture = rest / (2 * height);
        const size_t from = (picture * height + (line >> 1)) * width + (column >> 1);
        store4(y + 4 * i, load4(x + 4 * (from * row_quads + i % row_quads)));
    }
}

// The cell of `time` x `space` x `space` that number `i` of its channel-slowest order lies in: frame, row, column.
struct Cell {
    int channel, dt, dh, dw;
    __device__ __forceinline__ Cell(size_t i, int time, int space) {
        dw = i % space, dh = i / space % space, dt = i / (space * space) % time, channel = i / (space * space) / time;
    }
};

// y[b, t, h, w, o] = the mean of `group` neighbouring numbers of a cell of x, the channel slowest; `missing` frames of
// zeros come first. `n` numbers of y, whose sizes are the others'.
template <class X>
__device__ __forceinline__ void average_down(const X *x, X *y, size_t n, int channels, int group, int time, int space, int missing, int to, int frames, int height, int width) {
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
        const size_t pixel = i / to, w = pixel % width, h = pixel / width % height, rest = pixel / width / height;
        const size_t t = rest % frames, b = rest / frames;
        float sum = 0.f;
        for (int j = 0; j < group; ++j) {
            const Cell cell(i % to * group + j, time, space);
            const long long frame = (long long)t * time + cell.dt - missing;
            if (frame < 0) continue;
            const size_t row = ((b * (frames * time - missing) + frame) * height + h) * space + cell.dh;
            sum += wide(x[((row * width + w) * space + cell.dw) * channels + cell.channel]);
        }
        y[i] = narrow<X>(sum / float(group));
    }
}

// y[b, t, h, w, o] = the number of x that is copied there; the sizes are those of x.
template <class X>
__device__ __forceinline__ void duplicate_up(const X *x, X *y, size_t n, int channels, int copies, int time, int space, int to, int frames, int height, int width) {
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
        const size_t pixel = i / to, column = pixel % (width * space), rest = pixel / (width * space);
        const size_t line = rest % (height * space), frame = rest / (height * space);  // frames of all items
        const size_t cell = ((i % to * time + frame % time) * space + line % space) * space + column % space;
        const size_t from = ((frame / time) * height + line / space) * width + column / space;
        y[i] = x[from * channels + cell / copies];
    }
}

// Red, green and blue bytes [b, t, h p, w p, 3] of x [b, t, h, w, 3 p p] in -1..1, whose channel (c p + dx) p + dy is that of
// pixel (p h + dy, p w + dx); `bad` becomes 1 where a number is not below `limit` in magnitude. `n` pixels of y, the other sizes those of x. Rounded as
// on the host, step by step.
template <class X>
__device__ __forceinline__ void rgb_bytes(const X *x, unsigned char *y, unsigned char *bad, size_t n, int patch, int height, int width, float limit) {
    const size_t down = size_t(height) * patch, across = size_t(width) * patch;
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += size_t(gridDim.x) * blockDim.x) {
        const size_t column = i % across, line = i / across % down, frame = i / across / down;
        const size_t cell = (frame * height + line / patch) * width + column / patch;
        const X *from = x + cell * 3 * patch * patch + column % patch * patch + line % patch;
        for (int c = 0; c < 3; ++c) {
            const float v = wide(from[c * patch * patch]);
            if (!(fabsf(v) < limit)) *bad = 1;
            const float bounded = fminf(fmaxf(v, -1.f), 1.f);
            y[3 * i + c] = (unsigned char)__fadd_rn(__fmul_rn(__fadd_rn(bounded, 1.f), 127.5f), 0.5f);
        }
    }
}

#define VOLUME(X, XN)                                                                                                              \
    extern "C" __global__ void to_rows_##XN(const X *x, X *y, int channels, int padded, size_t n) { to_rows(x, y, channels, padded, n); } \
    extern "C" __global__ void channel_norm_##XN(const X *x, const X *gamma, X *y, size_t rows, int channels, int lanes, int is_silu) { \
        channel_norm(x, gamma, y, rows, channels, lanes, is_silu);                                                                 \
    }                                                                                                                              \
    extern "C" __global__ void twice_##XN(const X *x, X *y, size_t quads, int channels, int height, int width) {                   \
        twice(x, y, quads, channels, height, width);                                                                               \
    }                                                                                                                              \
    extern "C" __global__ void average_down_##XN(const X *x, X *y, size_t n, int channels, int group, int time, int space,         \
                                                 int missing, int to, int frames, int height, int width) {                        \
        average_down(x, y, n, channels, group, time, space, missing, to, frames, height, width);                                   \
    }                                                                                                                              \
    extern "C" __global__ void duplicate_up_##XN(const X *x, X *y, size_t n, int channels, int copies, int time, int space,        \
                                                 int to, int frames, int height, int width) {                                     \
        duplicate_up(x, y, n, channels, copies, time, space, to, frames, height, width);                                           \
    }                                                                                                                              \
    extern "C" __global__ void rgb_bytes_##XN(const X *x, unsigned char *y, unsigned char *bad, size_t n, int patch, int height, int width, float limit) { \
        rgb_bytes(x, y, bad, n, patch, height, width, limit);                                                                             \
    }
VOLUME(float, f32)
VOLUME(__nv_bfloat16, bf16)
VOLUME(__half, f16)
