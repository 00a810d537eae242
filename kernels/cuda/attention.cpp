#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#define CUDNN_FRONTEND_SKIP_JSON_LIB
#include <cudnn_frontend.h>
#include "attention.h"

namespace cudnn_frontend { void *cudnn_dlhandle = nullptr; }   // the frontend only declares it
namespace fe = cudnn_frontend;
using Tensor = fe::graph::Tensor_attributes;
using Dims   = std::vector<int64_t>;

struct SdpaPlan { fe::graph::Graph g; cudnnHandle_t handle; std::vector<int64_t> uids; };

static int fail(char *err, size_t n, const std::string &m) { if (err && n) snprintf(err, n, "%s", m.c_str()); return 1; }
#define TRY(x) do { auto s_ = (x); if (s_.is_bad()) return fail(err, n, std::string(#x) + ": " + s_.get_message()); } while (0)
#define CATCH catch (const std::exception &e) { return fail(err, n, e.what()); } catch (...) { return fail(err, n, "unknown exception"); }

extern "C" int sdpa_open(const char *lib, void **handle, char *err, size_t n) try {
    if (!fe::cudnn_dlhandle && !(fe::cudnn_dlhandle = dlopen(lib, RTLD_NOW))) return fail(err, n, dlerror());
    // cuDNN compiles the attention kernels with NVRTC, which has no search path for its own builtins; and the frontend
    // takes any libcudart.so.12 first. So load the three from one place; whoever asks later gets them by soname.
    Dl_info di{};
    std::string dir;
    if (dladdr(dlsym(fe::cudnn_dlhandle, "cudnnGetVersion"), &di)) dir = di.dli_fname, dir.resize(dir.rfind('/') + 1);
    for (std::string so : {"libnvrtc-builtins.so.13.0", "libnvrtc.so.13", "libcudart.so.13"})
        for (auto &d : {std::string(), dir + "../../cu13/lib/", std::string("/usr/local/cuda/lib64/")})
            if (dlopen((d + so).c_str(), RTLD_NOW)) {
                if (so[3] == 'c') setenv("CUDNN_FRONTEND_CUDART_LIB_NAME", (d + so).c_str(), 0);
                break;
            }
    auto s = fe::detail::create_handle(reinterpret_cast<cudnnHandle_t *>(handle));
    return s == CUDNN_STATUS_SUCCESS ? 0 : fail(err, n, std::string("cudnnCreate: ") + fe::detail::get_error_string(s));
} CATCH

extern "C" int sdpa_plan(void *handle, const SdpaDesc *p, SdpaPlan **out, int64_t *ws, char *err, size_t n) try {
    auto plan = std::make_unique<SdpaPlan>();
    plan->handle = static_cast<cudnnHandle_t>(handle);
    auto &g = plan->g;
    g.set_io_data_type(fe::DataType_t::BFLOAT16).set_intermediate_data_type(fe::DataType_t::FLOAT).set_compute_data_type(fe::DataType_t::FLOAT).set_sm_version(p->sm);
    auto dims = [&](int64_t s) { return Dims{p->b, p->h, s, p->d}; };
    auto strides = [&](int64_t s) { return Dims{s * p->mem_h * p->d, p->d, p->mem_h * p->d, 1}; };
    auto in = [&](int uid, int64_t s) { return g.tensor(Tensor().set_uid(uid).set_dim(dims(s)).set_stride(strides(s))); };
    auto io = [&](std::shared_ptr<Tensor> t, int uid, int64_t s) { t->set_output(true).set_uid(uid).set_dim(dims(s)).set_stride(strides(s)); };
    Dims sd{p->b, p->h, p->sq, 1}, ss{p->h * p->sq, p->sq, 1, 1};
    auto q = in(SDPA_Q, p->sq), k = in(SDPA_K, p->skv), v = in(SDPA_V, p->skv);
    if (p->kind == SDPA_BWD) {
        auto o = in(SDPA_O, p->sq), go = in(SDPA_DO, p->sq);
        auto lse = g.tensor(Tensor().set_uid(SDPA_STATS).set_dim(sd).set_stride(ss).set_data_type(fe::DataType_t::FLOAT));
        auto a = fe::graph::SDPA_backward_attributes().set_name("sdpa_bwd").set_attn_scale(p->scale).set_deterministic_algorithm(p->deterministic != 0);
        auto [dq, dk, dv] = g.sdpa_backward(q, k, v, o, go, lse, a);
        io(dq, SDPA_DQ, p->sq), io(dk, SDPA_DK, p->skv), io(dv, SDPA_DV, p->skv);
    } else {
        auto a = fe::graph::SDPA_attributes().set_name("sdpa").set_attn_scale(p->scale).set_generate_stats(p->stats != 0)
            .set_implementation(p->impl == 1 ? fe::AttentionImplementation_t::COMPOSITE : fe::AttentionImplementation_t::AUTO);
        auto r = g.sdpa(q, k, v, a);
        auto o = r[0], lse = r[1];
        io(o, SDPA_O, p->sq);
        if (lse) lse->set_output(true).set_uid(SDPA_STATS).set_dim(sd).set_stride(ss).set_data_type(fe::DataType_t::FLOAT);
    }
    TRY(g.validate());
    TRY(g.build_operation_graph(plan->handle));
    TRY(g.create_execution_plans({fe::HeurMode_t::A}));
    TRY(g.check_support());
    TRY(g.build_plans());
    TRY(g.get_workspace_size(*ws));
    plan->uids = g.get_variant_pack_uids_sorted();
    for (auto u : plan->uids) if (u <= 0 || u >= SDPA_SLOTS) return fail(err, n, "unexpected tensor uid " + std::to_string(u));
    *out = plan.release();
    return 0;
} CATCH

extern "C" int sdpa_run(SdpaPlan *p, void *stream, void *const *slots, void *ws, char *err, size_t n) try {
    void *ptr[SDPA_SLOTS];
    for (size_t i = 0; i < p->uids.size(); i++) ptr[i] = slots[p->uids[i]];
    if (fe::detail::set_stream(p->handle, static_cast<cudaStream_t>(stream)) != CUDNN_STATUS_SUCCESS) return fail(err, n, "cudnnSetStream");
    TRY(p->g.execute(p->handle, ptr, int(p->uids.size()), ws));
    return 0;
} CATCH
