//! cuDNN's attention through the C shim of `cuda/attention.cpp`, with a plan for each shape.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::{DType, Result};
use cudarc::driver::CudaContext;

use super::tensor::{candle_address, pointer};
use super::{Card, told};
use crate::Tensor;
use crate::attention::Passes;
use crate::attention::cudnn::{Calls, Gradients, Heads, Output};
use crate::settings::Repeatability;

/// Where the loader finds it.
const LIBRARY: &CStr = c"libcudnn.so.9";

/// The slots of `sdpa_run`, as in `attention.h`.
mod slot {
    pub const Q: usize = 1;
    pub const K: usize = 2;
    pub const V: usize = 3;
    pub const O: usize = 4;
    pub const STATS: usize = 5;
    pub const D_O: usize = 6;
    pub const D_Q: usize = 7;
    pub const D_K: usize = 8;
    pub const D_V: usize = 9;
    pub const COUNT: usize = 10;
}

const FORWARD: i32 = 0;
const BACKWARD: i32 = 1;

/// `SdpaDesc` of `attention.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
struct Description {
    b: i64,
    h: i64,
    sq: i64,
    skv: i64,
    d: i64,
    mem_h: i64,
    scale: f32,
    kind: i32,
    stats: i32,
    deterministic: i32,
    implementation: i32,
    sm: i32,
}

#[cfg(cudnn_headers)]
// SAFETY: the names and types of `cuda/attention.h`; callers pass live pointers and a text buffer of n bytes.
unsafe extern "C" {
    fn sdpa_open(library: *const c_char, handle: *mut *mut c_void, error: *mut c_char, n: usize) -> i32;
    fn sdpa_plan(
        handle: *mut c_void,
        description: *const Description,
        plan: *mut *mut c_void,
        workspace: *mut i64,
        error: *mut c_char,
        n: usize,
    ) -> i32;
    fn sdpa_run(
        plan: *mut c_void,
        stream: *mut c_void,
        slots: *const *mut c_void,
        workspace: *mut c_void,
        error: *mut c_char,
        n: usize,
    ) -> i32;
}

/// Stands in for the shim in a build that found no cuDNN headers; `open` fails, so the others are never reached.
#[cfg(not(cudnn_headers))]
mod absent {
    use super::{Description, c_char, c_void};
    // SAFETY: `call` passes a buffer of n bytes.
    pub unsafe fn sdpa_open(_: *const c_char, _: *mut *mut c_void, error: *mut c_char, n: usize) -> i32 {
        let why = b"this binary was built without the headers of cuDNN\0";
        // SAFETY: `call` passes a buffer of n bytes, and n is more than the text.
        unsafe { std::ptr::copy_nonoverlapping(why.as_ptr().cast(), error, why.len().min(n)) };
        1
    }
    // SAFETY: touches nothing.
    pub unsafe fn sdpa_plan(
        _: *mut c_void,
        _: *const Description,
        _: *mut *mut c_void,
        _: *mut i64,
        _: *mut c_char,
        _: usize,
    ) -> i32 {
        1
    }
    // SAFETY: touches nothing.
    pub unsafe fn sdpa_run(
        _: *mut c_void,
        _: *mut c_void,
        _: *const *mut c_void,
        _: *mut c_void,
        _: *mut c_char,
        _: usize,
    ) -> i32 {
        1
    }
}
#[cfg(not(cudnn_headers))]
use absent::{sdpa_open, sdpa_plan, sdpa_run};

/// Calls the shim with a buffer for its text.
fn call(work: impl FnOnce(*mut c_char, usize) -> i32) -> std::result::Result<(), String> {
    let mut text = [0_u8; 1024];
    match work(text.as_mut_ptr().cast(), text.len()) {
        0 => Ok(()),
        _ => Err(CStr::from_bytes_until_nul(&text)
            .map_or_else(|_| "no text".to_owned(), |text| text.to_string_lossy().into_owned())),
    }
}

/// What a plan depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    batch: usize,
    heads: usize,
    heads_in_memory: usize,
    queries: usize,
    keys: usize,
    size: usize,
    kind: i32,
}

#[derive(Clone, Copy)]
struct ExecutionPlan {
    raw: *mut c_void,
    workspace: usize,
}

/// cuDNN on one GPU, opened when it is first asked for.
pub(crate) struct Sdpa {
    opened: OnceLock<std::result::Result<Handle, String>>,
    /// Shapes that cuDNN refused are kept as such, so that it is asked once.
    plans: Mutex<HashMap<Key, Option<ExecutionPlan>>>,
    /// Refusals that are not reported yet.
    refused: Mutex<Vec<String>>,
    repeatability: Repeatability,
    architecture: i32,
}

struct Handle(*mut c_void);

// SAFETY: the handle and the plans are used under the lock of `plans`, one thread at a time, as cuDNN asks.
unsafe impl Send for Sdpa {}
// SAFETY: as above.
unsafe impl Sync for Sdpa {}

impl Sdpa {
    pub(crate) fn new(context: &Arc<CudaContext>, repeatability: Repeatability) -> Self {
        let (major, minor) = context.compute_capability().unwrap_or((0, 0));
        Self {
            opened: OnceLock::new(),
            plans: Mutex::default(),
            refused: Mutex::default(),
            repeatability,
            architecture: major * 10 + minor,
        }
    }

    fn handle(&self) -> std::result::Result<&Handle, String> {
        let opened = self.opened.get_or_init(|| {
            if self.architecture < 80 {
                return Err(format!("compute capability {} is below 8.0", self.architecture));
            }
            crate::attention::cudnn::cudnn()?;
            // That opened the library, wherever it was found; the shim gets it by its name.
            let mut handle = std::ptr::null_mut();
            // SAFETY: the name ends with nul; the handle is written before it returns 0.
            call(|text, n| unsafe { sdpa_open(LIBRARY.as_ptr(), &mut handle, text, n) })?;
            Ok(Handle(handle))
        });
        opened.as_ref().map_err(Clone::clone)
    }
}

impl Card {
    /// Whether cuDNN's attention can run here, or why not.
    pub(crate) fn cudnn(&self) -> std::result::Result<(), String> {
        self.context.bind_to_thread().map_err(|why| why.to_string())?;
        self.sdpa.handle().map(|_| ())
    }

    /// See [`crate::attention::refusals`].
    pub(crate) fn refused_attention(&self) -> Vec<String> {
        std::mem::take(&mut *self.sdpa.refused.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Attention through cuDNN, written to `out`. False, and nothing is done, where it is absent or has no engine for these
    /// shapes.
    pub(crate) fn attention(&self, heads: Heads, [q, k, v]: [&Tensor; 3], out: &Output) -> Result<bool> {
        let key = Key::new(heads, FORWARD);
        let mut slots = [0; slot::COUNT];
        slots[slot::Q] = pointer(q)?;
        slots[slot::K] = pointer(k)?;
        slots[slot::V] = pointer(v)?;
        slots[slot::O] = pointer(&out.o)?;
        slots[slot::STATS] = pointer(&out.lse)?;
        self.run(key, &slots)
    }

    /// The gradients through cuDNN, written to `gradients`. False where it is absent or has no engine for these shapes.
    pub(crate) fn attention_backward(
        &self,
        heads: Heads,
        [q, k, v]: [&Tensor; 3],
        out: &Output,
        d_out: &Tensor,
        gradients: &Gradients,
    ) -> Result<bool> {
        let whole = Key::new(heads, BACKWARD);
        let Gradients { dq, dk, dv } = gradients;
        let mut slots = [0; slot::COUNT];
        let tensors = [
            (slot::Q, q),
            (slot::K, k),
            (slot::V, v),
            (slot::O, &out.o),
            (slot::D_O, d_out),
            (slot::D_Q, dq),
            (slot::D_K, dk),
            (slot::D_V, dv),
        ];
        for (slot, tensor) in tensors {
            slots[slot] = pointer(tensor)?;
        }
        slots[slot::STATS] = pointer(&out.lse)?;
        for Slice { sample, first, key } in self.sdpa.slices(&whole) {
            let mut here = slots;
            for (slot, tensor) in tensors {
                let numbers = sample * tensor.elem_count() / whole.batch + first * whole.size;
                here[slot] += (numbers * DType::BF16.size_in_bytes()) as u64;
            }
            let rows = (sample * whole.heads + first) * whole.queries;
            here[slot::STATS] += (rows * DType::F32.size_in_bytes()) as u64;
            if !self.run(key, &here)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// See [`crate::attention::prepare`]. Refusals are reported as those of calls are.
    pub(crate) fn prepare_attention(&self, heads: Heads, passes: Passes) {
        if self.cudnn().is_err() {
            return;
        }
        let backward = Key::new(heads, BACKWARD);
        let slices = self.sdpa.slices(&backward).into_iter().map(|slice| slice.key);
        let backwards = slices.filter(|_| passes == Passes::Both);
        for key in std::iter::once(Key::new(heads, FORWARD)).chain(backwards) {
            let mut plans = self.sdpa.plans.lock().unwrap_or_else(PoisonError::into_inner);
            plans.entry(key).or_insert_with(|| self.sdpa.plan_or_refusal(&key));
        }
    }

    /// Runs the plan of `key`, built at the first call. False if there is none.
    fn run(&self, key: Key, slots: &[u64; slot::COUNT]) -> Result<bool> {
        told(self.context.bind_to_thread())?;
        let mut plans = self.sdpa.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = *plans.entry(key).or_insert_with(|| self.sdpa.plan_or_refusal(&key));
        let Some(plan) = plan else { return Ok(false) };
        let workspace = self.raw(plan.workspace.max(1), DType::U8)?;
        let (workspace, stream) = (candle_address(&workspace)? as *mut c_void, self.stream.cu_stream());
        let slots = slots.map(|address| address as *mut c_void);
        // SAFETY: the slots hold what a plan of this kind wants, by the descriptions above; the workspace has the
        // size asked for and is freed behind the launch on the same stream.
        call(|text, n| unsafe { sdpa_run(plan.raw, stream.cast(), slots.as_ptr(), workspace, text, n) })
            .map_err(|why| candle_core::Error::msg(format!("cuDNN's attention failed: {why}")))?;
        Ok(true)
    }
}

impl Sdpa {
    /// The plan of `key`. If cuDNN is available and has none, its reason is kept to be reported.
    fn plan_or_refusal(&self, key: &Key) -> Option<ExecutionPlan> {
        self.handle().ok()?;
        match self.plan(key) {
            Ok(plan) => Some(plan),
            Err(why) => {
                let Key { batch, heads, queries, keys, size, .. } = *key;
                let pass = if key.kind == FORWARD { "forward" } else { "backward" };
                let line = format!(
                    "cuDNN has no attention {pass} for {batch} x {heads} heads of {size}, {queries} queries and {keys} \
                     keys: it runs in chunks, several times slower ({why})"
                );
                self.refused.lock().unwrap_or_else(PoisonError::into_inner).push(line);
                None
            }
        }
    }

    fn plan(&self, key: &Key) -> std::result::Result<ExecutionPlan, String> {
        let handle = self.handle()?;
        let deterministic = self.repeatability == Repeatability::BitForBit;
        let automatic = Description {
            b: key.batch as i64,
            h: key.heads as i64,
            sq: key.queries as i64,
            skv: key.keys as i64,
            d: key.size as i64,
            mem_h: key.heads_in_memory as i64,
            scale: (1.0 / (key.size as f64).sqrt()) as f32,
            kind: key.kind,
            stats: 1,
            deterministic: i32::from(deterministic && key.kind == BACKWARD),
            implementation: 0,
            sm: self.architecture,
        };
        let make = |description: &Description| {
            let (mut raw, mut workspace) = (std::ptr::null_mut(), 0);
            // SAFETY: the handle is open; the plan and its size are written before it returns 0.
            call(|text, n| unsafe { sdpa_plan(handle.0, description, &mut raw, &mut workspace, text, n) })
                .map(|()| ExecutionPlan { raw, workspace: workspace as usize })
        };
        // The automatic graph is the newer one and has no second try of its own.
        make(&automatic).or_else(|_| make(&Description { implementation: 1, ..automatic }))
    }

    /// The calls of a backward; slices of heads are offsets into each token.
    fn slices(&self, whole: &Key) -> Vec<Slice> {
        let shape = [whole.batch, whole.heads, whole.size];
        let calls = Calls::of(shape, [whole.queries, whole.keys], self.repeatability);
        let of_sample = |sample: usize| {
            (0..whole.heads).step_by(calls.heads).map(move |first| {
                let key = Key { batch: calls.samples, heads: calls.heads.min(whole.heads - first), ..*whole };
                Slice { sample, first, key }
            })
        };
        (0..whole.batch).step_by(calls.samples).flat_map(of_sample).collect()
    }
}

/// One call of a backward: some heads of one sample, or all of all.
struct Slice {
    sample: usize,
    first: usize,
    key: Key,
}

impl Key {
    fn new(Heads { batch, heads, size, queries, keys }: Heads, kind: i32) -> Self {
        Self { batch, heads, heads_in_memory: heads, queries, keys, size, kind }
    }
}
