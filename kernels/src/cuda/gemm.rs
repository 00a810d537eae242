//! Matrix products through cuBLASLt: sums onto what is there, bias and GELU in the same pass, f32 results of bf16
//! factors. candle's own product has none of these.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Result};
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::clock::seconds;
use super::tensor::{address, pointer};
use super::{Card, told};
use crate::Tensor;
use crate::product::{End, Lines, Then};
use crate::settings::Repeatability;

const WORKSPACE: usize = crate::settings::PRODUCT_WORKSPACE;
/// Products of fewer operations than this take cuBLASLt's first guess: they are over before a choice pays.
const MEASURED_FROM: usize = 20_000_000_000;
/// Guesses that are measured for a larger one.
const GUESSES: usize = 8;
/// Runs of each; the shortest counts.
const RUNS: usize = 3;
/// Another guess than the first is taken where its time is below this share of the first's.
const CLEARLY_FASTER: f64 = 0.99;

/// A matrix in memory as cuBLAS sees it: by columns, so that ours by rows is its transpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Matrix {
    dtype: Number,
    /// Whether cuBLAS has to turn it round.
    turned: bool,
    /// Numbers from one line in memory to the next.
    stride: usize,
    /// The largest power of two, up to 256, that the address is a multiple of.
    alignment: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Number {
    F32,
    Bf16,
    F16,
}

impl std::fmt::Display for Number {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        })
    }
}

impl Number {
    fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => Some(Self::F32),
            DType::BF16 => Some(Self::Bf16),
            DType::F16 => Some(Self::F16),
            _ => None,
        }
    }

    fn cuda(self) -> sys::cudaDataType {
        match self {
            Self::F32 => sys::cudaDataType::CUDA_R_32F,
            Self::Bf16 => sys::cudaDataType::CUDA_R_16BF,
            Self::F16 => sys::cudaDataType::CUDA_R_16F,
        }
    }
}

/// What a plan depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    sizes: [usize; 3],
    a: Matrix,
    b: Matrix,
    out: Number,
    out_alignment: u32,
    is_onto: bool,
    is_biased: bool,
    then: Then,
}

/// For files: two keys have the same text only where they are the same.
impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let [m, n, k] = self.sizes;
        write!(f, "{m}x{n}x{k}")?;
        for Matrix { dtype, turned, stride, alignment } in [self.a, self.b] {
            write!(f, " {dtype}/{}/{stride}/{alignment}", if turned { "t" } else { "n" })?;
        }
        write!(f, " {}/{}", self.out, self.out_alignment)?;
        let then = match self.then {
            Then::Stay => "",
            Then::Gelu => "+gelu",
        };
        let (onto, bias) =
            (if self.is_onto { "+onto" } else { "" }, if self.is_biased { "+bias" } else { "" });
        write!(f, "{onto}{bias}{then}")
    }
}

/// A planned product: its descriptors and the chosen algorithm.
struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    /// Of b, a and the result, in the order in which cuBLAS multiplies.
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// The addresses of the operands of one product.
struct Operands {
    a: u64,
    b: u64,
    onto: Option<u64>,
    y: u64,
    scale: f32,
}

/// The cuBLASLt handle of a GPU with its plans and workspace.
pub(crate) struct Gemm {
    handle: sys::cublasLtHandle_t,
    plans: Mutex<HashMap<Key, Plan>>,
    /// Which of cuBLASLt's guesses was the fastest, by the key's text.
    choices: Mutex<BTreeMap<String, usize>>,
    workspace: CudaSlice<u8>,
    repeatability: Repeatability,
}

// SAFETY: a cuBLASLt handle may be used from any thread (cuBLAS's manual, "Thread Safety"); the plans, whose
// descriptors change with every call, are protected by the lock.
unsafe impl Send for Gemm {}
// SAFETY: as above.
unsafe impl Sync for Gemm {}

impl Gemm {
    pub(crate) fn new(stream: &Arc<CudaStream>, repeatability: Repeatability) -> Result<Self> {
        let handle = blas(result::create_handle())?;
        // SAFETY: the workspace is only written by cuBLASLt before it reads it.
        let workspace = told(unsafe { stream.alloc::<u8>(WORKSPACE) })?;
        let (plans, choices) = (Mutex::default(), Mutex::default());
        Ok(Self { handle, plans, choices, workspace, repeatability })
    }
}

impl Card {
    /// Writes the product of `a` and `b` to `y`, as [`crate::product::product`] says. False, and nothing is done, where cuBLASLt
    /// has no way for these matrices.
    pub(crate) fn product(
        &self,
        a: (&Tensor, Lines),
        b: (&Tensor, Lines),
        end: End,
        y: &Tensor,
    ) -> Result<bool> {
        let ((m, k), (_, n)) = (a.0.dims2()?, b.0.dims2()?);
        let Some(out) = Number::of(end.dtype) else { return Ok(false) };
        told(self.context.bind_to_thread())?;
        let (Some(a_matrix), Some(b_matrix)) = (matrix(a)?, matrix(b)?) else { return Ok(false) };
        let (a, b) = (a.0, b.0);
        let onto = end.onto.map(pointer).transpose()?;
        let out_alignment = alignment(pointer(y)?).min(onto.map_or(256, alignment));
        let key = Key {
            sizes: [m, n, k],
            a: a_matrix,
            b: b_matrix,
            out,
            out_alignment,
            is_onto: onto.is_some(),
            is_biased: end.bias.is_some(),
            then: end.then,
        };
        let operands =
            Operands { a: address(a)?, b: address(b)?, onto, y: pointer(y)?, scale: end.scale as f32 };
        let mut plans = self.gemm.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match plans.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => match self.gemm.plan(&key) {
                Ok((plan, guesses)) => {
                    point_to_bias(&plan, end.bias)?;
                    let algorithm = self.fastest(&plan, &guesses, &key, &operands)?;
                    new.insert(Plan { algorithm, ..plan })
                }
                Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => return Ok(false),
                Err(why) => return blas(Err(why)),
            },
        };
        point_to_bias(plan, end.bias)?;
        self.multiply(plan, &plan.algorithm, &operands)?;
        Ok(true)
    }

    /// See [`crate::device::product_choices`].
    pub(crate) fn product_choices(&self) -> BTreeMap<String, usize> {
        self.gemm.choices.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// See [`crate::device::keep_product_choices`].
    pub(crate) fn keep_product_choices(&self, choices: BTreeMap<String, usize>) {
        self.gemm.choices.lock().unwrap_or_else(PoisonError::into_inner).extend(choices);
    }

    fn multiply(
        &self,
        plan: &Plan,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        operands: &Operands,
    ) -> Result<()> {
        let &Operands { a, b, onto, y, scale } = operands;
        let beta = if onto.is_some() { 1.0_f32 } else { 0.0 };
        let (workspace, _guard) = self.gemm.workspace.device_ptr(&self.stream);
        // SAFETY: `product` measured all matrices, and they live until the stream has used them; the workspace is used by
        // one product at a time, in the order of the stream.
        blas(unsafe {
            result::matmul(
                self.gemm.handle,
                plan.description,
                std::ptr::from_ref(&scale).cast(),
                std::ptr::from_ref(&beta).cast(),
                b as *const c_void,
                plan.layouts[0],
                a as *const c_void,
                plan.layouts[1],
                onto.unwrap_or(y) as *const c_void,
                plan.layouts[2],
                y as *mut c_void,
                plan.layouts[2],
                algorithm,
                workspace as *mut c_void,
                WORKSPACE,
                self.stream.cu_stream().cast(),
            )
        })
    }

    /// The fastest of `guesses`: as measured before, or measured now on the output, which the caller computes again afterwards.
    /// Measuring waits for the GPU, once for each kind of product of a run. In deterministic runs it is the first guess,
    /// since a clock does not give the same answer twice.
    fn fastest(
        &self,
        plan: &Plan,
        guesses: &[sys::cublasLtMatmulAlgo_t],
        key: &Key,
        operands: &Operands,
    ) -> Result<sys::cublasLtMatmulAlgo_t> {
        let operations = 2 * key.sizes.iter().product::<usize>();
        let is_settled = self.gemm.repeatability == Repeatability::BitForBit || operations < MEASURED_FROM;
        if is_settled || guesses.len() < 2 {
            return Ok(plan.algorithm);
        }
        let text = key.to_string();
        let mut choices = self.gemm.choices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = choices.get(&text).and_then(|index| guesses.get(*index)) {
            return Ok(*known);
        }
        let time = |algorithm| {
            let mut best = f64::INFINITY;
            for _ in 0..RUNS {
                let before = self.timed_mark()?;
                self.multiply(plan, algorithm, operands)?;
                best = best.min(seconds(&before, &self.timed_mark()?)?);
            }
            Ok::<_, candle_core::Error>(best)
        };
        let (mut best, mut shortest) = (0, CLEARLY_FASTER * time(&guesses[0])?);
        for (index, guess) in guesses.iter().enumerate().skip(1) {
            // A guess that cannot run here is not the fastest.
            let taken = time(guess).unwrap_or(f64::INFINITY);
            if taken < shortest {
                (best, shortest) = (index, taken);
            }
        }
        choices.insert(text, best);
        Ok(guesses[best])
    }
}

fn point_to_bias(plan: &Plan, bias: Option<&Tensor>) -> Result<()> {
    let Some(bias) = bias else { return Ok(()) };
    let bias = pointer(bias)?;
    // SAFETY: the plan's descriptor lives; the attribute is a device pointer.
    blas(unsafe { describe(plan.description, BIAS_POINTER, &bias) })
}

const BIAS_POINTER: sys::cublasLtMatmulDescAttributes_t =
    sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;

impl Gemm {
    /// The descriptors of `key`, and the algorithms that cuBLASLt's heuristic suggests, the most promising first.
    ///
    /// y = a b by rows is y^T = b^T a^T by columns: cuBLAS's first factor is our second.
    fn plan(&self, key: &Key) -> std::result::Result<(Plan, Vec<sys::cublasLtMatmulAlgo_t>), CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        let [m, n, k] = key.sizes;
        let single = sys::cudaDataType::CUDA_R_32F;
        let epilogue = match (key.is_biased, key.then) {
            (true, Then::Stay) => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            (true, Then::Gelu) => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_GELU_BIAS,
            (false, Then::Stay) => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_DEFAULT,
            (false, Then::Gelu) => sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_GELU,
        };
        let description = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, single)?;
        let layout = |matrix: &Matrix, rows: usize, columns: usize| {
            let (rows, columns) = if matrix.turned { (columns, rows) } else { (rows, columns) };
            result::create_matrix_layout(
                matrix.dtype.cuda(),
                rows as u64,
                columns as u64,
                matrix.stride as i64,
            )
        };
        let layouts = [
            layout(&key.b, n, k)?,
            layout(&key.a, k, m)?,
            result::create_matrix_layout(key.out.cuda(), n as u64, m as u64, n as i64)?,
        ];
        let preference = result::create_matmul_pref()?;
        // SAFETY: descriptors and layouts were made just now; each attribute has the type cuBLASLt documents.
        let guesses = unsafe {
            describe(description, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &i32::from(key.b.turned))?;
            describe(description, Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &i32::from(key.a.turned))?;
            describe(description, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &(epilogue as u32))?;
            prefer(preference, Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE)?;
            prefer(preference, Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &key.b.alignment)?;
            prefer(preference, Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &key.a.alignment)?;
            prefer(preference, Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &key.out_alignment)?;
            prefer(preference, Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &key.out_alignment)?;
            let guesses = self.guesses(description, layouts, preference);
            result::destroy_matmul_pref(preference)?;
            guesses?
        };
        Ok((Plan { description, layouts, algorithm: guesses[0] }, guesses))
    }

    /// The algorithms that cuBLASLt's heuristic suggests, the most promising first; at least one.
    ///
    /// # Safety
    /// All three were made by cuBLASLt and live.
    // SAFETY: the caller's promise.
    unsafe fn guesses(
        &self,
        description: sys::cublasLtMatmulDesc_t,
        [first, second, out]: [sys::cublasLtMatrixLayout_t; 3],
        preference: sys::cublasLtMatmulPreference_t,
    ) -> std::result::Result<Vec<sys::cublasLtMatmulAlgo_t>, CublasError> {
        // SAFETY: numbers and an array of them, for which all zero is a value.
        let mut found: [sys::cublasLtMatmulHeuristicResult_t; GUESSES] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        // SAFETY: the caller's promise, and `found` has room for as many as are asked for.
        unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                description,
                first,
                second,
                out,
                out,
                preference,
                GUESSES as i32,
                found.as_mut_ptr(),
                &mut count,
            )
            .result()?;
        }
        let is_fit = |found: &&sys::cublasLtMatmulHeuristicResult_t| {
            found.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
        };
        let guesses: Vec<_> =
            found.iter().take(count as usize).filter(is_fit).map(|found| found.algo).collect();
        match guesses.is_empty() {
            true => Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)),
            false => Ok(guesses),
        }
    }
}

/// # Safety
/// `T` is the type that cuBLASLt documents for the attribute.
// SAFETY: callers promise the type of the attribute.
unsafe fn describe<T>(
    description: sys::cublasLtMatmulDesc_t,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> std::result::Result<(), CublasError> {
    let value_pointer = std::ptr::from_ref(value).cast();
    // SAFETY: the caller's promise.
    unsafe { result::set_matmul_desc_attribute(description, attribute, value_pointer, size_of::<T>()) }
}

/// # Safety
/// `T` is the type that cuBLASLt documents for the attribute.
// SAFETY: callers promise the type of the attribute.
unsafe fn prefer<T>(
    preference: sys::cublasLtMatmulPreference_t,
    attribute: sys::cublasLtMatmulPreferenceAttributes_t,
    value: &T,
) -> std::result::Result<(), CublasError> {
    let value_pointer = std::ptr::from_ref(value).cast();
    // SAFETY: the caller's promise.
    unsafe { result::set_matmul_pref_attribute(preference, attribute, value_pointer, size_of::<T>()) }
}

/// `x` [rows, columns] as cuBLAS sees it.
fn matrix((x, Lines { turned, stride }): (&Tensor, Lines)) -> Result<Option<Matrix>> {
    let alignment = alignment(address(x)?);
    Ok(Number::of(x.dtype()).map(|dtype| Matrix { dtype, turned, stride, alignment }))
}

fn alignment(address: u64) -> u32 {
    1 << address.trailing_zeros().min(8)
}

/// cuBLAS's error in candle's words.
fn blas<T>(result: std::result::Result<T, CublasError>) -> Result<T> {
    result.map_err(|why| candle_core::Error::msg(format!("cuBLASLt: {why:?}")))
}
