// The AdamW update in one pass, in the order of torch.optim.AdamW.
#include "common.cuh"

extern "C" __global__ void adamw_f32(const float *parameter, const float *first, const float *second, const float *gradient,
                                     float *new_parameter, float *new_first, float *new_second, size_t count, float factor,
                                     float shrink, float beta1, float beta2, float rate, float root_correction, float eps) {
    for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += size_t(gridDim.x) * blockDim.x) {
        const float g = gradient[i] * factor;
        const float m = first[i] * beta1 + g * (1.f - beta1);
        const float v = second[i] * beta2 + g * g * (1.f - beta2);
        new_first[i] = m;
        new_second[i] = v;
        new_parameter[i] = parameter[i] * shrink - m / (sqrtf(v) / root_correction + eps) * rate;
    }
}
