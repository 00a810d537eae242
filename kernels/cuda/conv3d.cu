// Convolutions over video. In memory the channels of a pixel lie side by side, [b, t, h, w, c]: so what one tap of a kernel
// reads for one output is a run of whole 16-byte pieces, and the patch matrix of a convolution exists only tile by tile in
// shared memory.
#include "common.cuh"

// The sizes of a convolution. Frames come in three parts: `zeros` that exist nowhere, `past` of them, those of x.
struct Volume {
    int c_in, c_out, frames, height, width, past, zeros;
    int kt, kh, kw, time_stride, space_stride, top, left;
    int out_frames, out_height, out_width;
    __device__ __forceinline__ int positions() const { return out_frames * out_height * out_width; }
    __device__ __forceinline__ int taps() const { return kt * kh * kw; }
};

// Where the sum over taps and channels stands. Neighbouring columns come one after the other: they read almost the
// same pixels, which then are still in the nearest cache.
struct Tap {
    int dt, dh, dw, c;
    // True when the frame changes.
    __device__ __forceinline__ bool next(const Volume &v, int step) {
        if (++dw < v.kw) return false;
        dw = 0;
        if ((c += step) < v.c_in) return false;
        c = 0;
        if (++dh < v.kh) return false;
        dh = 0;
        ++dt;
        return true;
    }
    __device__ __forceinline__ int index(const Volume &v) const { return (dt * v.kh + dh) * v.kw + dw; }
};

// The rows just above and just below the frames of a band, which are a neighbour's, [b, t, w, c]: of x, and of the frames before it;
// null where the frame ends.
template <class X> struct Around {
    const X *above, *below, *past_above, *past_below;

    // The channels from `c` on of the pixel in column `w` of `row`, which is not in frame `f` itself, or null where there is none.
    __device__ __forceinline__ const X *at(const Volume &v, int b, int f, int row, int w, int c) const {
        const bool is_past = f < v.past;
        const X *line = row == -1 ? (is_past ? past_above : above) : row == v.height ? (is_past ? past_below : below) : nullptr;
        const long long frame = is_past ? (long long)b * v.past + f : (long long)b * v.frames + f - v.past;
        return line ? line + (frame * v.width + w) * v.c_in + c : nullptr;
    }
};

// N output positions, `stride` apart, of batch item `b`, and the input that each of them meets.
template <class X, int N> struct Rows {
    const X *frame[N];  // the pixel under the kernel's first tap, or null where the frame is none
    int t[N], h[N], w[N];

    __device__ __forceinline__ void start(const Volume &v, int first, int stride) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int p = first + i * stride, column = p % v.out_width, rest = p / v.out_width;
            h[i] = rest % v.out_height * v.space_stride - v.top;
            w[i] = column * v.space_stride - v.left;
            // Positions behind the last read frames that do not exist.
            t[i] = p < v.positions() ? rest / v.out_height * v.time_stride - v.zeros : -(1 << 30);
        }
    }

    __device__ __forceinline__ void enter(const Volume &v, const X *x, const X *past, int b, int dt) {
        const long long picture = (long long)v.height * v.width;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int f = t[i] + dt;
            const X *start = f < v.past ? past + ((long long)b * v.past + f) * picture * v.c_in
                                        : x + ((long long)b * v.frames + f - v.past) * picture * v.c_in;
            frame[i] = f < 0 ? nullptr : start + ((long long)h[i] * v.width + w[i]) * v.c_in;
        }
    }

    // The channels from `c` on of the pixel under a tap, or null where there is none.
    __device__ __forceinline__ const X *at(const Volume &v, int i, const Tap &tap, int c) const {
        const bool is_inside = unsigned(h[i] + tap.dh) < unsigned(v.height) && unsigned(w[i] + tap.dw) < unsigned(v.width);
        return frame[i] && is_inside && c < v.c_in ? frame[i] + (tap.dh * v.width + tap.dw) * v.c_in + c : nullptr;
    }

    // The same in a band, of batch item `b`.
    __device__ __forceinline__ const X *at(const Volume &v, const Around<X> &around, int b, int i, const Tap &tap, int c) const {
        const int row = h[i] + tap.dh, column = w[i] + tap.dw;
        if (unsigned(row) < unsigned(v.height)) return at(v, i, tap, c);
        const bool is_there = frame[i] && unsigned(column) < unsigned(v.width) && c < v.c_in;
        return is_there ? around.at(v, b, t[i] + tap.dt, row, column, c) : nullptr;
    }
};

// Which tile a block has: tiles of channels that read the same pixels run side by side.
struct Place {
    int b, position, channel;
    __device__ __forceinline__ Place(const Volume &v, int tile_positions, int tile_channels) {
        const int across = (v.c_out + tile_channels - 1) / tile_channels;
        const int down = (v.positions() + tile_positions - 1) / tile_positions;
        channel = blockIdx.x % across * tile_channels;
        position = blockIdx.x / across % down * tile_positions;
        b = blockIdx.x / across / down;
    }
};

#ifndef EMULATED
// 16 bytes into shared memory, in the background; zeros where there is no source. What neighbouring taps read again
// goes through the nearest cache, what is read once passes by it.
__device__ __forceinline__ void fetch(uint32_t to, const void *from, const void *any) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from ? from : any), "r"(from ? 16 : 0));
}
__device__ __forceinline__ void fetch_once(uint32_t to, const void *from, const void *any) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from ? from : any), "r"(from ? 16 : 0));
}
__device__ __forceinline__ void fetched() { asm volatile("cp.async.commit_group;"); }
template <int LEFT> __device__ __forceinline__ void wait_for_fetched() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT)); }
__device__ __forceinline__ uint32_t shared_address(const void *p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Four 8 x 8 matrices of 16-bit numbers from rows in shared memory.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row));
}

// d += a b: a is 16 x 16, b 16 x 8, sums in f32.
#define MULTIPLY(X, NAME)                                                                                              \
    __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, X) {     \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "      \
                     "{%8,%9}, {%0,%1,%2,%3};"                                                                         \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                  \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                  \
    }
MULTIPLY(__nv_bfloat16, "bf16")
MULTIPLY(__half, "f16")
#endif

// y[p, o] = bias[o] + sum over taps and c of x[p + tap, c] weight[o, tap, c] on tensor cores.
//
// A block of eight warps has 256 positions and CHANNELS outputs; four stages of 32 channels of one tap each are on
// their way while one is multiplied. A row of a stage is 64 bytes, its four pieces are swapped by the row's number so
// that neither storing nor loading of eight rows meets one bank twice.
#define POSITIONS 256
#define STAGES 4
#define DEPTH 32

__device__ __forceinline__ uint32_t piece(int row, int index) { return (row * 4 + (index ^ ((row >> 1) & 3))) * 16; }

// sum += the 64 rows of a warp times its share of the channels, 32 deep; `a` and `b` say where a lane's rows of 16 deep
// halves lie.
template <int COLUMNS, class X, class A, class B>
__device__ __forceinline__ void multiply_stage(float (&sum)[4][COLUMNS][4], A a, B b) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint32_t pixels[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) load_matrices(pixels[i], a(i, half));
#pragma unroll
        for (int j = 0; j < COLUMNS; j += 2) {
            uint32_t weights[4];
            load_matrices(weights, b(j, half));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                multiply(sum[i][j], pixels[i], weights[0], weights[1], X());
                multiply(sum[i][j + 1], pixels[i], weights[2], weights[3], X());
            }
        }
    }
}

template <class X> __device__ __forceinline__ X added(X a, X b) { return narrow<X>(wide(a) + wide(b)); }
template <class X> struct alignas(16) Eight { X v[8]; };

// Sums and bias by way of shared memory, `out`, so that whole pieces go to y; `onto` is added to what is rounded already, as a
// pass of its own would.
template <int CHANNELS, class X>
__device__ __forceinline__ void put(const float (&sum)[4][CHANNELS / 16][4], const X *bias, const X *onto, X *out, X *y, const Volume &v, const Place &place) {
    constexpr int SHARE = CHANNELS / 2, COLUMNS = SHARE / 8, SPACED = CHANNELS + 8;
    const int thread = threadIdx.x, lane = thread & 31, down = thread >> 5 & 3, across = thread >> 7;
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
        const int column = across * SHARE + j * 8 + (lane & 3) * 2, o = place.channel + column;
        const float b0 = bias && o < v.c_out ? wide(bias[o]) : 0.f, b1 = bias && o + 1 < v.c_out ? wide(bias[o + 1]) : 0.f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int lower = 0; lower < 2; ++lower) {
                X *to = out + (down * 64 + i * 16 + lower * 8 + (lane >> 2)) * SPACED + column;
                to[0] = narrow<X>(sum[i][j][lower * 2] + b0);
                to[1] = narrow<X>(sum[i][j][lower * 2 + 1] + b1);
            }
        }
    }
    __syncthreads();
    const long long first = ((long long)place.b * v.positions() + place.position) * v.c_out + place.channel;
    const int most = min(CHANNELS, v.c_out - place.channel), rows_here = min(POSITIONS, v.positions() - place.position);
    if (v.c_out % 8 == 0) {
        for (int i = thread; i < POSITIONS * (CHANNELS / 8); i += 256) {
            const int r = i / (CHANNELS / 8), c = i % (CHANNELS / 8) * 8;
            if (r >= rows_here || c >= most) continue;
            const long long at = first + (long long)r * v.c_out + c;
            Eight<X> eight = *reinterpret_cast<const Eight<X> *>(out + r * SPACED + c);
            if (onto) {
                const Eight<X> more = *reinterpret_cast<const Eight<X> *>(onto + at);
#pragma unroll
                for (int e = 0; e < 8; ++e) eight.v[e] = added(eight.v[e], more.v[e]);
            }
            *reinterpret_cast<Eight<X> *>(y + at) = eight;
        }
    } else {
        for (int i = thread; i < rows_here * most; i += 256) {
            const long long at = first + (long long)(i / most) * v.c_out + i % most;
            const X one = out[i / most * SPACED + i % most];
            y[at] = onto ? added(one, onto[at]) : one;
        }
    }
}

template <int CHANNELS, class X>
__device__ __forceinline__ void convolve(const X *x, const X *past, const Around<X> &, const X *weight, const X *bias, const X *onto, X *y, const Volume v) {
    extern __shared__ uint4 stages[];
    constexpr int STAGE = (POSITIONS + CHANNELS) * 64, SHARE = CHANNELS / 2;
    const int thread = threadIdx.x, lane = thread & 31, down = thread >> 5 & 3, across = thread >> 7;
    const Place place(v, POSITIONS, CHANNELS);
    const int row = thread >> 2, index = thread & 3, taps = v.taps();
    const uint32_t base = shared_address(stages);

    Rows<X, 4> rows;
    rows.start(v, place.position + row, 64);
    rows.enter(v, x, past, place.b, 0);
    Tap tap = {0, 0, 0, 0};
    const int steps = taps * ((v.c_in + DEPTH - 1) / DEPTH);
    int asked = 0;
    auto ask = [&]() {
        if (asked < steps) {
            const uint32_t stage = base + asked % STAGES * STAGE;
            const int c = tap.c + index * 8;
#pragma unroll
            for (int i = 0; i < 4; ++i) fetch(stage + piece(row + 64 * i, index), rows.at(v, i, tap, c), x);
#pragma unroll
            for (int r = row; r < CHANNELS; r += 64) {
                const int o = place.channel + r;
                const X *from = o < v.c_out && c < v.c_in ? weight + ((long long)o * taps + tap.index(v)) * v.c_in + c : nullptr;
                fetch_once(stage + piece(POSITIONS + r, index), from, x);
            }
            if (tap.next(v, DEPTH) && tap.dt < v.kt) rows.enter(v, x, past, place.b, tap.dt);
        }
        ++asked;
        fetched();
    };

    float sum[4][SHARE / 8][4] = {};
    for (int s = 0; s < STAGES - 1; ++s) ask();
    for (int step = 0; step < steps; ++step) {
        wait_for_fetched<STAGES - 2>();
        __syncthreads();
        ask();
        const uint32_t stage = base + step % STAGES * STAGE;
        multiply_stage<SHARE / 8, X>(
            sum, [&](int i, int half) { return stage + piece(down * 64 + i * 16 + (lane & 15), half * 2 + (lane >> 4)); },
            [&](int j, int half) { return stage + piece(POSITIONS + across * SHARE + j * 8 + (lane & 7) + (lane >> 4 << 3), half * 2 + (lane >> 3 & 1)); });
    }
    wait_for_fetched<0>();
    __syncthreads();
    put<CHANNELS>(sum, bias, onto, reinterpret_cast<X *>(stages), y, v, place);
}

// The pixels of neighbouring positions, for kernels that step by one and keep the width: slot s is the one at the place of
// position `first` - 1 + s. A thread has every 64th.
template <class X> struct Slots : Rows<X, 5> {
    __device__ __forceinline__ void start(const Volume &v, int first) {
#pragma unroll
        for (int i = 0; i < 5; ++i) {
            const int p = first - 1 + i * 64, rest = p / v.width;
            this->h[i] = rest % v.out_height - v.top;
            this->w[i] = p % v.width;
            this->t[i] = p >= 0 && p < v.positions() ? rest / v.out_height * v.time_stride - v.zeros : -(1 << 30);
        }
    }

    // The channels from `c` on of the pixel `dh` lines below a slot, or null where there is none.
    __device__ __forceinline__ const X *at(const Volume &v, int i, int dh, int c) const {
        const bool is_inside = unsigned(this->h[i] + dh) < unsigned(v.height) && c < v.c_in;
        return this->frame[i] && is_inside ? this->frame[i] + dh * v.width * v.c_in + c : nullptr;
    }

    // The same in a band, of batch item `b`, `dt` frames on.
    __device__ __forceinline__ const X *at(const Volume &v, const Around<X> &around, int b, int i, int dt, int dh, int c) const {
        const int row = this->h[i] + dh;
        if (unsigned(row) < unsigned(v.height)) return at(v, i, dh, c);
        return this->frame[i] && c < v.c_in ? around.at(v, b, this->t[i] + dt, row, this->w[i], c) : nullptr;
    }
};

// The same for kernels three wide that step by one and keep the width. What three taps side by side read of 256 positions in
// a row is the same 258 pixels, so a slab of them is fetched once, and a tap reads from one slot further on. The first and
// the last of a line have no neighbour in it: there a row of zeros is read.
//
// A stage is a slab of 32 channels with the weights of its three taps; one is on its way while one is multiplied.
#define SLOTS 260
template <int CHANNELS, bool IS_BAND, class X>
__device__ __forceinline__ void convolve_lines(const X *x, const X *past, const Around<X> &around, const X *weight, const X *bias, const X *onto, X *y, const Volume v) {
    extern __shared__ uint4 stages[];
    constexpr int STAGE = (SLOTS + 3 * CHANNELS) * 64, SHARE = CHANNELS / 2;
    const int thread = threadIdx.x, lane = thread & 31, down = thread >> 5 & 3, across = thread >> 7;
    const Place place(v, POSITIONS, CHANNELS);
    const int row = thread >> 2, index = thread & 3, taps = v.taps();
    const uint32_t base = shared_address(stages), zeros = base + 2 * STAGE;
    if (thread < 4) stages[2 * STAGE / 16 + thread] = make_uint4(0, 0, 0, 0);

    Slots<X> slots;
    slots.start(v, place.position + row);
    slots.enter(v, x, past, place.b, 0);
    const int slabs = v.kt * v.kh * ((v.c_in + DEPTH - 1) / DEPTH);
    int asked = 0, dt = 0, dh = 0, first_c = 0;
    auto ask = [&]() {
        if (asked < slabs) {
            const uint32_t stage = base + (asked & 1) * STAGE;
            const int c = first_c + index * 8;
            auto slot = [&](int i) {
                if constexpr (IS_BAND) return slots.at(v, around, place.b, i, dt, dh, c);
                else return slots.at(v, i, dh, c);
            };
#pragma unroll
            for (int i = 0; i < 4; ++i) fetch_once(stage + piece(row + 64 * i, index), slot(i), x);
            if (row < 2) fetch_once(stage + piece(row + 256, index), slot(4), x);
            const X *first = weight + (long long)(dt * v.kh + dh) * 3 * v.c_in + c;
#pragma unroll
            for (int r = row; r < CHANNELS; r += 64) {
                const int o = place.channel + r;
                const bool is_there = o < v.c_out && c < v.c_in;
#pragma unroll
                for (int dw = 0; dw < 3; ++dw) {
                    const X *from = is_there ? first + ((long long)o * taps + dw) * v.c_in : nullptr;
                    fetch_once(stage + piece(SLOTS + dw * CHANNELS + r, index), from, x);
                }
            }
            if (++asked < slabs && (first_c += DEPTH) >= v.c_in) {
                first_c = 0;
                if (++dh == v.kh) {
                    dh = 0;
                    slots.enter(v, x, past, place.b, ++dt);
                }
            }
        }
        fetched();
    };

    // Which of the lane's rows are first, and which last, in their line: a bit each.
    int firsts = 0, lasts = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int column = (place.position + down * 64 + i * 16 + (lane & 15)) % v.width;
        firsts |= (column == 0) << i;
        lasts |= (column == v.width - 1) << i;
    }

    float sum[4][SHARE / 8][4] = {};
    ask();
    for (int slab = 0; slab < slabs; ++slab) {
        wait_for_fetched<0>();
        __syncthreads();
        ask();
        const uint32_t stage = base + (slab & 1) * STAGE;
#pragma unroll
        for (int dw = 0; dw < 3; ++dw) {
            const int edges = dw == 0 ? firsts : dw == 2 ? lasts : 0;
            multiply_stage<SHARE / 8, X>(
                sum,
                [&](int i, int half) {
                    return edges >> i & 1 ? zeros : stage + piece(down * 64 + i * 16 + (lane & 15) + dw, half * 2 + (lane >> 4));
                },
                [&](int j, int half) {
                    const int r = SLOTS + dw * CHANNELS + across * SHARE + j * 8 + (lane & 7) + (lane >> 4 << 3);
                    return stage + piece(r, half * 2 + (lane >> 3 & 1));
                });
        }
    }
    __syncthreads();
    put<CHANNELS>(sum, bias, onto, reinterpret_cast<X *>(stages), y, v, place);
}

// The same in f32 without tensor cores: a thread has 8 positions and 6 channels of 128 x 96.
template <bool IS_BAND>
__device__ __forceinline__ void convolve_wide(const float *x, const float *past, const Around<float> &around, const float *weight, const float *bias, const float *onto, float *y, const Volume v) {
    __shared__ float4 xs4[16][33], ws4[16][25];
    float *xs = reinterpret_cast<float *>(xs4), *ws = reinterpret_cast<float *>(ws4);
    const int thread = threadIdx.x, row = thread >> 2, index = thread & 3, down = thread >> 4, across = thread & 15;
    const Place place(v, 128, 96);
    Rows<float, 2> rows;
    rows.start(v, place.position + row, 64);
    rows.enter(v, x, past, place.b, 0);
    Tap tap = {0, 0, 0, 0};
    const int taps = v.taps(), steps = taps * ((v.c_in + 15) / 16);
    float4 next[4];
    auto pixel = [&](int i, int c) {
        if constexpr (IS_BAND) return rows.at(v, around, place.b, i, tap, c);
        else return rows.at(v, i, tap, c);
    };
    auto ask = [&]() {
        const int c = tap.c + index * 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int o = place.channel + row + 64 * (i - 2);
            const bool is_there = o < v.c_out && c < v.c_in && row + 64 * (i - 2) < 96;
            const float *from = i < 2 ? pixel(i & 1, c) : is_there ? weight + ((long long)o * taps + tap.index(v)) * v.c_in + c : nullptr;
            next[i] = from ? load4(from) : make_float4(0.f, 0.f, 0.f, 0.f);
        }
        if (tap.next(v, 16) && tap.dt < v.kt) rows.enter(v, x, past, place.b, tap.dt);
    };
    float sum[8][6] = {};
    ask();
    for (int step = 0; step < steps; ++step) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = row + 64 * (i & 1);
            if (i == 3 && r >= 96) continue;
            float *to = i < 2 ? xs + index * 4 * 132 + r : ws + index * 4 * 100 + r;
            const int pitch = i < 2 ? 132 : 100;
            to[0] = next[i].x, to[pitch] = next[i].y, to[2 * pitch] = next[i].z, to[3 * pitch] = next[i].w;
        }
        __syncthreads();
        if (step + 1 < steps) ask();
#pragma unroll
        for (int k = 0; k < 16; ++k) {
            const float4 low = load4(xs + k * 132 + down * 4), high = load4(xs + k * 132 + 64 + down * 4);
            const float a[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int j = 0; j < 6; ++j) {
                const float b = ws[k * 100 + j * 16 + across];
#pragma unroll
                for (int i = 0; i < 8; ++i) sum[i][j] = fmaf(a[i], b, sum[i][j]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int p = place.position + (i >> 2) * 64 + down * 4 + (i & 3);
#pragma unroll
        for (int j = 0; j < 6; ++j) {
            const int o = place.channel + j * 16 + across;
            if (p >= v.positions() || o >= v.c_out) continue;
            const long long at = ((long long)place.b * v.positions() + p) * v.c_out + o;
            y[at] = sum[i][j] + (bias ? bias[o] : 0.f) + (onto ? onto[at] : 0.f);
        }
    }
}

#define SIZES                                                                                                            \
    int c_in, int c_out, int frames, int height, int width, int past_frames, int zeros, int kt, int kh, int kw,          \
        int time_stride, int space_stride, int top, int left, int out_frames, int out_height, int out_width
#define VOLUME                                                                                                           \
    const Volume v = {c_in, c_out, frames, height, width, past_frames, zeros, kt, kh, kw, time_stride, space_stride,     \
                      top, left, out_frames, out_height, out_width}
#define CONVOLVE(NAME, X, ...)                                                                                           \
    extern "C" __global__ void __launch_bounds__(256)                                                                    \
        NAME(const X *x, const X *past, const X *weight, const X *bias, const X *onto, X *y, SIZES) {                    \
        VOLUME;                                                                                                          \
        const Around<X> around = {};                                                                                     \
        __VA_ARGS__(x, past, around, weight, bias, onto, y, v);                                                          \
    }
// Of a band, whose neighbours' rows are tensors of their own; so many blocks are to fit onto a multiprocessor.
#define CONVOLVE_BAND(NAME, X, BLOCKS, ...)                                                                              \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS)                                                            \
        NAME(const X *x, const X *past, const X *above, const X *below, const X *past_above, const X *past_below,        \
             const X *weight, const X *bias, const X *onto, X *y, SIZES) {                                               \
        VOLUME;                                                                                                          \
        const Around<X> around = {above, below, past_above, past_below};                                                 \
        __VA_ARGS__(x, past, around, weight, bias, onto, y, v);                                                          \
    }
CONVOLVE(conv3d_f32, float, convolve_wide<false>)
CONVOLVE_BAND(conv3d_band_f32, float, 2, convolve_wide<true>)
#define CONVOLVE_FAST(X, XN)                                                   \
    CONVOLVE(conv3d_32_##XN, X, convolve<32>)                                  \
    CONVOLVE(conv3d_96_##XN, X, convolve<96>)                                  \
    CONVOLVE(conv3d_128_##XN, X, convolve<128>)                                \
    CONVOLVE(conv3d_lines_32_##XN, X, convolve_lines<32, false>)               \
    CONVOLVE(conv3d_lines_96_##XN, X, convolve_lines<96, false>)               \
    CONVOLVE(conv3d_lines_128_##XN, X, convolve_lines<128, false>)             \
    CONVOLVE_BAND(conv3d_band_lines_32_##XN, X, 2, convolve_lines<32, true>)   \
    CONVOLVE_BAND(conv3d_band_lines_96_##XN, X, 1, convolve_lines<96, true>)   \
    CONVOLVE_BAND(conv3d_band_lines_128_##XN, X, 1, convolve_lines<128, true>)
CONVOLVE_FAST(__nv_bfloat16, bf16)
CONVOLVE_FAST(__half, f16)
