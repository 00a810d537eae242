// Products in 8-bit integers: rows of activations as codes with a scale, and products of them with codes of a frozen matrix.
//
// Sums are 32-bit integers and exact, so they are the same on every card, in every tiling, and on the CPU. The tiles take 96 KiB of
// shared memory and use the instructions of compute capability 8.0, so that the same kernel runs on a 3090, a 4090 and a 5090.
#include "rotation.cuh"

// ---- rows to codes ----

// The larger of two, or NaN: a number that is not one makes its row's scale, and what is multiplied by it, NaN.
__device__ __forceinline__ float larger(float a, float b) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
    return a;
}
// The scale of a row whose largest magnitude is `top`, and what its numbers are multiplied by.
struct Scale {
    float step, inverse;
};
__device__ __forceinline__ Scale scale_of(float top) {
    top = larger(top, 1.17549435e-36f);
    return Scale{__fdiv_rn(top, 127.f), __fdiv_rn(127.f, top)};
}
// The product is at most 127 and a rounding error, so that nothing is cut off.
__device__ __forceinline__ int code_of(float number, Scale scale) { return __float2int_rn(number * scale.inverse); }

// The largest of all threads of a block; `scratch` has 32 floats.
__device__ __forceinline__ float block_largest(float top, float *scratch) {
    for (int offset = 16; offset; offset >>= 1) top = larger(top, __shfl_xor_sync(0xffffffffu, top, offset));
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = top;
    __syncthreads();
    top = 0.f;
    for (int i = 0; i < blockDim.x / 32; i++) top = larger(top, scratch[i]);
    return top;
}

// A line of a row, or zeros behind its end.
template <class X> __device__ __forceinline__ void load_line(float (&v)[LINE], const X *row, int at, int width) {
#pragma unroll
    for (int i = 0; i < LINE; i += 4) {
        const float4 four = at < width ? load4(row + at + i) : make_float4(0.f, 0.f, 0.f, 0.f);
        v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
    }
}

// Where a code of sixteen is stored: in order, or as the backward product reads them, 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15.
template <bool BACKWARD> __device__ __forceinline__ int place_of(int i) { return BACKWARD ? (i & 6) * 2 + (i & 8) / 4 + (i & 1) : i; }

// codes, scale = rows of x, rotated in groups; for the backward each number then times its column's `factor`. One block a row, of
// width / (16 LINES) threads in whole warps; widths are multiples of sixteen. `exchange` has 272 floats for each sixteen threads.
template <int LINES, bool BACKWARD, class X> __device__ void code_rotated(const X *x, const float *factor, int8_t *codes, float *scale, int width, int group) {
    extern __shared__ float exchange[];
    __shared__ float scratch[32];
    const int lane = threadIdx.x & 15;
    float *mine = exchange + (threadIdx.x >> 4) * 16 * 17;
    const size_t start = size_t(blockIdx.x) * width;
    float all[LINES][LINE], top = 0.f;
#pragma unroll
    for (int n = 0; n < LINES; n++) load_line(all[n], x + start, LINE * (threadIdx.x + n * blockDim.x), width);
#pragma unroll
    for (int n = 0; n < LINES; n++) {
        turn_line(all[n], mine, group);
#pragma unroll
        for (int i = 0; i < LINE; i++) {
            if (BACKWARD) {
                const int column = LINE * (threadIdx.x - lane + n * blockDim.x + i) + lane;
                all[n][i] *= column < width ? __ldg(factor + column) : 0.f;
            }
            top = larger(top, fabsf(all[n][i]));
        }
    }
    const Scale s = scale_of(block_largest(top, scratch));
    if (threadIdx.x == 0) scale[blockIdx.x] = s.step;
    int8_t *bytes = reinterpret_cast<int8_t *>(mine);
#pragma unroll
    for (int n = 0; n < LINES; n++) {
        const int at = LINE * (threadIdx.x + n * blockDim.x);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < LINE; i++) bytes[i * 16 + place_of<BACKWARD>(lane)] = int8_t(code_of(all[n][i], s));
        __syncwarp();
        if (at < width) *reinterpret_cast<int4 *>(codes + start + at) = *reinterpret_cast<const int4 *>(bytes + lane * 16);
    }
}

// y = rows of codes times scales, rotated back. Blocks as above.
template <int LINES> __device__ void decode_rotated(const int8_t *codes, const float *scale, float *y, int width, int group) {
    extern __shared__ float exchange[];
    const int lane = threadIdx.x & 15;
    float *mine = exchange + (threadIdx.x >> 4) * 16 * 17;
    const size_t start = size_t(blockIdx.x) * width;
    const float s = scale[blockIdx.x];
    for (int n = 0; n < LINES; n++) {
        const int at = LINE * (threadIdx.x + n * blockDim.x);
        float v[LINE];
#pragma unroll
        for (int i = 0; i < LINE; i++) v[i] = at < width ? float(codes[start + at + i]) * s : 0.f;
        turn_line(v, mine, group);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < LINE; i++) mine[i * 17 + lane] = v[i];
        __syncwarp();
        if (at < width) {
#pragma unroll
            for (int i = 0; i < LINE; i++) y[start + at + i] = mine[lane * 17 + i];
        }
    }
}

#define CODE(LINES, X, XN)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(512) code_forward_##LINES##_##XN(const X *x, int8_t *codes, float *scale, int width, int group) { \
        code_rotated<LINES, false>(x, (const float *)0, codes, scale, width, group);                                              \
    }                                                                                                                             \
    extern "C" __global__ void __launch_bounds__(512) code_backward_##LINES##_##XN(const X *dy, const float *factor, int8_t *codes, float *scale, int width, int group) { \
        code_rotated<LINES, true>(dy, factor, codes, scale, width, group);                                                        \
    }
CODE(1, float, f32)
CODE(2, float, f32)
CODE(1, __nv_bfloat16, bf16)
CODE(2, __nv_bfloat16, bf16)
CODE(1, __half, f16)
CODE(2, __half, f16)

#define DECODE(LINES)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(512) decode_rotated_##LINES(const int8_t *codes, const float *scale, float *y, int width, int group) { \
        decode_rotated<LINES>(codes, scale, y, width, group);                                                                     \
    }
DECODE(1)
DECODE(2)

// Columns of any float matrix to f32 ("from"), and of f32 to any ("to").
#define TURN(X, XN)                                                                                                               \
    extern "C" __global__ void __launch_bounds__(512) turn_columns_from_##XN(const X *x, float *y, int rows, int width, int group) { \
        turn_columns(x, y, rows, width, group);                                                                                   \
    }                                                                                                                             \
    extern "C" __global__ void __launch_bounds__(512) turn_columns_to_##XN(const float *x, X *y, int rows, int width, int group) { \
        turn_columns(x, y, rows, width, group);                                                                                   \
    }
TURN(float, f32)
TURN(__nv_bfloat16, bf16)
TURN(__half, f16)

// ---- products ----

#define TILE_M 128
#define TILE_N 256
#define TILE_K 64  // bytes of a stage
#define STAGES 4
#define STAGE_BYTES ((TILE_M + TILE_N) * TILE_K)
#define BAND 12    // tiles of rows that are multiplied with a tile of columns before the next: what they share stays in the cache

__device__ __forceinline__ uint32_t shared_address(const void *p) { return uint32_t(__cvta_generic_to_shared(p)); }
// Sixteen bytes to shared memory, or zeros where there are none; then nothing is read.
__device__ __forceinline__ void copy16(uint32_t to, const void *from, bool is_there) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_there ? 16 : 0));
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void arrived() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
__device__ __forceinline__ void load_turned_matrices(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
__device__ __forceinline__ void multiply(int (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The operands of y [m, n] = epilogue(a [m, k] b), as in `int8.rs`.
template <class Y> struct Product {
    const int8_t *a;
    const int8_t *b;
    const float *a_scale;
    const float *b_scale;
    const Y *bias;
    const Y *onto;
    Y *y;
    int m, n, k;
};

// Where sixteen bytes of a row of the stage are: rows of 64 bytes for a and the forward's b, of 256 for the backward's, spread so
// that eight lines of a matrix are in different banks.
__device__ __forceinline__ uint32_t in_narrow(int row, int chunk) { return row * TILE_K + ((chunk ^ (row >> 1)) & 3) * 16; }
__device__ __forceinline__ uint32_t in_wide(int row, int chunk) { return row * TILE_N + (chunk & 8) * 16 + ((chunk ^ row) & 7) * 16; }

// What a thread copies of each stage: sixteen bytes of rows that are `stride` apart. The forward's rows of b are stored so that a thread
// gets four consecutive columns of y: of sixteen, the even ones first.
template <bool BACKWARD> struct Copies {
    static constexpr int A = TILE_M * 4 / 256, B = TILE_N * 4 / 256;
    const int8_t *a, *b;
    size_t a_stride, b_stride, b_step;
    uint32_t to_a, to_b;
    int a_rows, b_rows;  // how many of them there are
    int left;            // bytes of k from this thread's first on; for the backward's b, rows of k

    template <class Y> __device__ __forceinline__ Copies(const Product<Y> &p, uint32_t base, int m0, int n0) {
        const int tid = threadIdx.x, row = tid >> 2, chunk = tid & 3;
        a_stride = size_t(64) * p.k, a = p.a + size_t(m0 + row) * p.k + chunk * 16, to_a = base + in_narrow(row, chunk);
        a_rows = (p.m - m0 - row + 63) / 64, left = p.k - chunk * 16;
        if (BACKWARD) {
            const int k = tid >> 4, n = n0 + (tid & 15) * 16;
            b_stride = size_t(16) * p.n, b_step = size_t(TILE_K) * p.n, b = p.b + size_t(k) * p.n + n;
            to_b = base + TILE_M * TILE_K + in_wide(k, tid & 15), b_rows = n < p.n ? p.k - k : 0;
        } else {
            const int n = n0 + (row & ~15) + ((row & 7) << 1) + ((row >> 3) & 1);
            b_stride = size_t(64) * p.k, b_step = TILE_K, b = p.b + size_t(n) * p.k + chunk * 16;
            to_b = base + TILE_M * TILE_K + in_narrow(row, chunk), b_rows = (p.n - n + 63) / 64;
        }
    }

    // The next stage, to the part `slot` of shared memory.
    __device__ __forceinline__ void next(int slot) {
        const uint32_t offset = slot * STAGE_BYTES;
#pragma unroll
        for (int i = 0; i < A; i++) copy16(to_a + offset + i * 64 * TILE_K, a + i * a_stride, i < a_rows && left > 0);
#pragma unroll
        for (int i = 0; i < B; i++) {
            const bool is_there = BACKWARD ? 16 * i < b_rows : i < b_rows && left > 0;
            copy16(to_b + offset + i * 64 * TILE_K, b + i * b_stride, is_there);
        }
        a += TILE_K, b += b_step, left -= TILE_K;
        if (BACKWARD) b_rows -= TILE_K;
    }
};

// GELU (tanh).
__device__ __forceinline__ float gelu(float x) {
    const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return x - __fdividef(x, 1.f + __expf(2.f * u));
}

// Rows of 16 of a warp's 64 x 64 sums: [unit of 16 columns][even and odd column][4], and what a thread has of them: four consecutive
// columns of rows `quad` and `quad` + 8.
typedef int Sums[4][8][4];

// Rotated back: strides 1 and 16 are within a thread, 4 among the four threads of a row, 64 among the four warps of a row of warps, which
// exchange sixteen rows at a time through shared memory.
template <bool BACKWARD, bool GELU, class Y> __device__ __forceinline__ void write(const Product<Y> &p, const Sums &sums, float *exchange, int m0, int n0, int group) {
    const int lane = threadIdx.x & 31, quad = lane >> 2, four = lane & 3, warp = threadIdx.x >> 5;
    const int own = n0 + (warp & 3) * 64 + four * 4;
    const float factor = turn_scale(group);
    float *rows = exchange + (warp >> 2) * 16 * TILE_N;
    float a_scale[8];
#pragma unroll
    for (int part = 0; part < 8; part++) a_scale[part] = m0 + part * 8 + quad < p.m ? __ldg(p.a_scale + m0 + part * 8 + quad) : 0.f;
    float4 by[4];
#pragma unroll
    for (int unit = 0; unit < 4; unit++) by[unit] = !BACKWARD && own + unit * 16 < p.n ? load4(p.b_scale + own + unit * 16) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        __syncthreads();
#pragma unroll
        for (int low = 0; low < 4; low += 2) {
            const int row = quad + 4 * low;
            const float scale = a_scale[2 * i + low / 2];
            float v[4][4];
#pragma unroll
            for (int unit = 0; unit < 4; unit++) {
                const int(&even)[4] = sums[i][2 * unit], (&odd)[4] = sums[i][2 * unit + 1];
                v[unit][0] = float(even[low]) * scale, v[unit][1] = float(odd[low]) * scale;
                v[unit][2] = float(even[low + 1]) * scale, v[unit][3] = float(odd[low + 1]) * scale;
                if (!BACKWARD) v[unit][0] *= by[unit].x, v[unit][1] *= by[unit].y, v[unit][2] *= by[unit].z, v[unit][3] *= by[unit].w;
                if (group >= 4) turn4(v[unit][0], v[unit][1], v[unit][2], v[unit][3]);
                if (group >= 16) {
#pragma unroll
                    for (int c = 0; c < 4; c++) {
                        const float pair = v[unit][c] + __shfl_xor_sync(0xffffffffu, v[unit][c], 1);
                        const float sum = pair + __shfl_xor_sync(0xffffffffu, pair, 2);
                        v[unit][c] = sum - 2.f * __shfl_xor_sync(0xffffffffu, v[unit][c], 3);
                    }
                }
            }
            if (group >= 64) {
#pragma unroll
                for (int c = 0; c < 4; c++) turn4(v[0][c], v[1][c], v[2][c], v[3][c]);
            }
#pragma unroll
            for (int unit = 0; unit < 4; unit++) store4(rows + row * TILE_N + (warp & 3) * 64 + unit * 16 + four * 4, make_float4(v[unit][0], v[unit][1], v[unit][2], v[unit][3]));
        }
        __syncthreads();
        // 16 rows of 64 quads, 128 threads: a thread has a column quad of eight rows, in each of the four warps' parts.
        const int part = threadIdx.x & 127, column = (part & 15) * 4;
#pragma unroll
        for (int row = part >> 4; row < 16; row += 8) {
            const int m = m0 + i * 16 + row;
            float4 v[4];
#pragma unroll
            for (int w = 0; w < 4; w++) v[w] = load4(rows + row * TILE_N + w * 64 + column);
            if (group >= 256) {
                turn4(v[0].x, v[1].x, v[2].x, v[3].x), turn4(v[0].y, v[1].y, v[2].y, v[3].y);
                turn4(v[0].z, v[1].z, v[2].z, v[3].z), turn4(v[0].w, v[1].w, v[2].w, v[3].w);
            }
#pragma unroll
            for (int w = 0; w < 4; w++) {
                const int n = n0 + w * 64 + column;
                if (m >= p.m || n >= p.n) continue;
                float4 sum = v[w] * factor;
                if (!BACKWARD && p.bias) sum = sum + load4(p.bias + n);
                if (p.onto) sum = sum + load4(p.onto + size_t(m) * p.n + n);
                if (GELU) sum = make_float4(gelu(sum.x), gelu(sum.y), gelu(sum.z), gelu(sum.w));
                store4(p.y + size_t(m) * p.n + n, sum);
            }
        }
    }
}

// A warp's factors of 32 steps of k, and where it reads them.
struct Factors {
    uint32_t a[4][4], b[4][4];
};
template <bool BACKWARD> struct Reads {
    uint32_t a, b;

    __device__ __forceinline__ Reads(uint32_t base, int warp_m, int warp_n) {
        const int lane = threadIdx.x & 31;
        a = base + in_narrow(warp_m + (lane & 15), lane >> 4);
        b = base + TILE_M * TILE_K + (BACKWARD ? in_wide(lane, warp_n >> 4) : in_narrow(warp_n + (lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1));
    }
    // The addresses of the other half, and of the other units of columns, differ in bits that the spread leaves apart.
    __device__ __forceinline__ void load(Factors &f, int slot, int half) const {
        const uint32_t offset = slot * STAGE_BYTES;
#pragma unroll
        for (int i = 0; i < 4; i++) load_matrices(f.a[i], ((a + offset) ^ (half * 32)) + i * 16 * TILE_K);
#pragma unroll
        for (int unit = 0; unit < 4; unit++) {
            if (BACKWARD) load_turned_matrices(f.b[unit], ((b + offset) ^ (unit * 16)) + half * 32 * TILE_N);
            else load_matrices(f.b[unit], ((b + offset) ^ (half * 32)) + unit * 16 * TILE_K);
        }
    }
};

template <bool BACKWARD> __device__ __forceinline__ void multiply_all(Sums &sums, const Factors &f) {
#pragma unroll
    for (int unit = 0; unit < 4; unit++) {
        const uint32_t(&r)[4] = f.b[unit];
        uint32_t b[4] = {r[0], r[1], r[2], r[3]};
        if (BACKWARD) {
            b[0] = __byte_perm(r[0], r[1], 0x6420), b[1] = __byte_perm(r[2], r[3], 0x6420);
            b[2] = __byte_perm(r[0], r[1], 0x7531), b[3] = __byte_perm(r[2], r[3], 0x7531);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            multiply(sums[i][2 * unit], f.a[i], b[0], b[1]);
            multiply(sums[i][2 * unit + 1], f.a[i], b[2], b[3]);
        }
    }
}

// Rows and columns from which tile `index` begins.
template <class Y> __device__ __forceinline__ int2 tile_start(const Product<Y> &p, int index) {
    const int tiles_m = (p.m + TILE_M - 1) / TILE_M, tiles_n = (p.n + TILE_N - 1) / TILE_N;
    const int band = index / (BAND * tiles_n), left = index - band * BAND * tiles_n, high = min(BAND, tiles_m - band * BAND);
    return make_int2((band * BAND + left % high) * TILE_M, left / high * TILE_N);
}

// 256 threads: eight warps, two down and four across, each with 64 x 64 sums. While one half of a stage is multiplied, the next is
// read from shared memory; while a tile is written, the first stages of the block's next one are copied.
template <bool BACKWARD, bool GELU, class Y> __device__ __forceinline__ void product(const Product<Y> &p, int group, int tiles) {
    extern __shared__ __align__(1024) uint8_t shared[];
    // The epilogue's exchange is where the last two stages are.
    constexpr int AHEAD = STAGES - 2;
    const int warp = threadIdx.x >> 5, warp_m = (warp >> 2) * 64, warp_n = (warp & 3) * 64;
    const int steps = (p.k + TILE_K - 1) / TILE_K;
    const uint32_t base = shared_address(shared);
    const Reads<BACKWARD> reads(base, warp_m, warp_n);
    int2 start = tile_start(p, blockIdx.x);
    Copies<BACKWARD> copies(p, base, start.x, start.y);
#pragma unroll
    for (int s = 0; s < AHEAD; s++) copies.next(s), commit();

    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        Sums sums;
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int c = 0; c < 4; c++) sums[i][j][c] = 0;

#pragma unroll
        for (int s = AHEAD; s < STAGES - 1; s++) copies.next(s), commit();
        arrived<STAGES - 2>();
        __syncthreads();
        Factors first, second;
        reads.load(first, 0, 0);
        int slot = 0;
        for (int step = 0; step < steps; step++) {
            reads.load(second, slot, 1);
            copies.next((slot + STAGES - 1) % STAGES), commit();
            multiply_all<BACKWARD>(sums, first);
            arrived<STAGES - 2>();
            __syncthreads();
            slot = (slot + 1) % STAGES;
            reads.load(first, slot, 0);
            multiply_all<BACKWARD>(sums, second);
        }
        arrived<0>();
        __syncthreads();
        const int2 now = start;
        if (tile + gridDim.x < tiles) {
            start = tile_start(p, tile + gridDim.x);
            copies = Copies<BACKWARD>(p, base, start.x, start.y);
#pragma unroll
            for (int s = 0; s < AHEAD; s++) copies.next(s), commit();
        }
        write<BACKWARD, GELU>(p, sums, reinterpret_cast<float *>(shared + AHEAD * STAGE_BYTES), now.x + warp_m, now.y, group);
        __syncthreads();
    }
}

#define PRODUCT(Y, YN)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(256, 1) int8_forward_##YN(const int8_t *a, const int8_t *b, const float *a_scale, const float *b_scale, \
                                                                           const Y *bias, const Y *onto, Y *y, int m, int n, int k, int group, int tiles) { \
        product<false, false>(Product<Y>{a, b, a_scale, b_scale, bias, onto, y, m, n, k}, group, tiles);                                     \
    }                                                                                                                             \
    extern "C" __global__ void __launch_bounds__(256, 1) int8_forward_gelu_##YN(const int8_t *a, const int8_t *b, const float *a_scale, const float *b_scale, \
                                                                                const Y *bias, const Y *onto, Y *y, int m, int n, int k, int group, int tiles) { \
        product<false, true>(Product<Y>{a, b, a_scale, b_scale, bias, onto, y, m, n, k}, group, tiles);                                      \
    }                                                                                                                             \
    extern "C" __global__ void __launch_bounds__(256, 1) int8_backward_##YN(const int8_t *a, const int8_t *b, const float *a_scale, const Y *onto, Y *y, \
                                                                            int m, int n, int k, int group, int tiles) {          \
        product<true, false>(Product<Y>{a, b, a_scale, (const float *)0, (const Y *)0, onto, y, m, n, k}, group, tiles);                 \
    }
PRODUCT(float, f32)
PRODUCT(__nv_bfloat16, bf16)
