//! What of CUDA this machine has: GPUs, their driver, and libraries, asked for by name at run time.
//!
//! Works in builds without CUDA too: a missing library is an answer, not an error.

// Functions looked up by name have the types of their headers, which the compiler cannot check.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::PathBuf;

use libloading::Library as Handle;

use crate::library::{in_words, open};

/// A library of CUDA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Library {
    /// As people call it.
    pub name: &'static str,
    /// Whether every use of a GPU needs it.
    pub is_needed: bool,
    /// Its version, or why it cannot be used.
    pub version: Result<String, String>,
    /// The file that was loaded, if known.
    pub path: Option<PathBuf>,
}

/// What the driver reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Driver {
    /// The newest CUDA that it can run, as (major, minor).
    pub cuda: (u32, u32),
    /// Version of the driver itself, such as 580.65.06, if known.
    pub version: Option<String>,
}

/// A GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Its number: `cuda:<index>`.
    pub index: usize,
    /// The product.
    pub name: String,
    /// Compute capability, as (major, minor).
    pub capability: (u32, u32),
    /// Bytes of its memory.
    pub memory: u64,
    /// Numbers of the GPUs whose memory it reaches directly.
    pub peers: Vec<usize>,
    /// Its place on the PCI bus, which no other GPU of the machine has, if the driver says.
    pub identity: Option<String>,
}

impl Gpu {
    /// Whether this crate's kernels run on it: compute capability 8.0 or later.
    pub fn is_new_enough(&self) -> bool {
        self.capability >= (8, 0)
    }
}

/// The CUDA version, (major, minor), that the driver must support for this build; `None` in a build without CUDA.
pub const fn built_for() -> Option<(u32, u32)> {
    #[cfg(feature = "cuda")]
    {
        const VERSION: u32 = candle_core::cuda_backend::cudarc::driver::sys::CUDA_VERSION;
        Some((VERSION / 1000, VERSION % 1000 / 10))
    }
    #[cfg(not(feature = "cuda"))]
    None
}

/// How a library reports its version.
enum Ask {
    /// A function that returns major * 10000 + minor * 100 + patch.
    Returned(&'static [u8]),
    /// A function that writes that number to its one argument.
    Written(&'static [u8]),
    /// The same with major * 1000 + minor * 10.
    WrittenInThousands(&'static [u8]),
    /// A function that writes major and minor to its two arguments.
    Two(&'static [u8]),
    /// A function that writes the part of a number: 0 major, 1 minor, 2 patch.
    Parts(&'static [u8]),
}

/// The libraries that a build with CUDA may use: name, beginning of the file's name, its version where it is not CUDA's,
/// and how to ask.
const LIBRARIES: [(&str, &str, Option<u32>, Ask); 7] = [
    ("CUDA runtime", "libcudart.so", None, Ask::WrittenInThousands(b"cudaRuntimeGetVersion")),
    ("cuBLAS", "libcublas.so", None, Ask::Parts(b"cublasGetProperty")),
    ("cuBLASLt", "libcublasLt.so", None, Ask::Returned(b"cublasLtGetVersion")),
    ("cuRAND", "libcurand.so", Some(10), Ask::Parts(b"curandGetProperty")),
    ("cuDNN", "libcudnn.so", Some(9), Ask::Returned(b"cudnnGetVersion")),
    ("NVRTC", "libnvrtc.so", None, Ask::Two(b"nvrtcVersion")),
    ("NCCL", "libnccl.so", Some(2), Ask::Written(b"ncclGetVersion")),
];

/// Those that every use of a GPU needs come first.
const NEEDED: usize = 4;

/// The CUDA whose libraries a build without CUDA looks for.
const NEWEST: u32 = 13;

/// Calls a C function of a library by name, with the type and value of each argument; a status other than 0 is an error.
macro_rules! call {
    ($handle:expr, $name:expr, $($type:ty: $value:expr),+) => {{
        // SAFETY: a type alone does nothing.
        type Function = unsafe extern "C" fn($($type),+) -> c_int;
        let name: &[u8] = $name;
        // SAFETY: every use below states the types that the library's header declares.
        let function = unsafe { $handle.get::<Function>(name) }.map_err(in_words);
        // SAFETY: every pointer is to a variable of the caller, of the length passed beside it.
        function.and_then(|function| success(name, unsafe { function($($value),+) }))
    }};
}

/// The libraries of CUDA, found or not.
pub fn libraries() -> Vec<Library> {
    let cuda = built_for().map_or(NEWEST, |(major, _)| major);
    let look = |(i, (name, file, own, ask)): (usize, &(&'static str, &str, Option<u32>, Ask))| {
        let file = format!("{file}.{}", own.unwrap_or(cuda));
        let (version, path) = match open(&file) {
            Ok(handle) => (version(handle, ask), path_of(&file)),
            Err(why) => (Err(why), None),
        };
        Library { name, is_needed: i < NEEDED, version, path }
    };
    LIBRARIES.iter().enumerate().map(look).collect()
}

/// The driver, or why it cannot be used.
pub fn driver() -> Result<Driver, String> {
    let handle = open(DRIVER)?;
    let version = number(handle, b"cuDriverGetVersion")?;
    Ok(Driver { cuda: (version / 1000, version % 1000 / 10), version: kernel_module() })
}

/// The GPUs that the driver lists, or why it lists none.
pub fn gpus() -> Result<Vec<Gpu>, String> {
    let handle = open(DRIVER)?;
    call!(handle, b"cuInit", c_uint: 0)?;
    let count = number(handle, b"cuDeviceGetCount")? as usize;
    (0..count).map(|index| gpu(handle, index, count)).collect()
}

/// File of the driver's library.
const DRIVER: &str = "libcuda.so.1";

fn version(handle: &Handle, ask: &Ask) -> Result<String, String> {
    let three = |n: u32| format!("{}.{}.{}", n / 10_000, n / 100 % 100, n % 100);
    let (mut major, mut minor, mut patch) = (0, 0, 0);
    match ask {
        Ask::Returned(name) => {
            // SAFETY: the headers declare `size_t name(void)`.
            let function = unsafe { handle.get::<unsafe extern "C" fn() -> usize>(*name) };
            // SAFETY: it only reads a constant.
            function.map(|function| three(unsafe { function() } as u32)).map_err(in_words)
        }
        Ask::Written(name) => number(handle, name).map(three),
        Ask::WrittenInThousands(name) => {
            number(handle, name).map(|n| format!("{}.{}", n / 1000, n % 1000 / 10))
        }
        Ask::Two(name) => {
            call!(handle, *name, *mut c_int: &mut major, *mut c_int: &mut minor)?;
            Ok(format!("{major}.{minor}"))
        }
        Ask::Parts(name) => {
            for (which, part) in [&mut major, &mut minor, &mut patch].into_iter().enumerate() {
                call!(handle, *name, c_int: which as c_int, *mut c_int: part)?;
            }
            Ok(format!("{major}.{minor}.{patch}"))
        }
    }
}

/// What the function `name` writes to its one argument, an int.
fn number(handle: &Handle, name: &[u8]) -> Result<u32, String> {
    let mut value = 0;
    call!(handle, name, *mut c_int: &mut value)?;
    Ok(value.unsigned_abs())
}

fn success(name: &[u8], status: c_int) -> Result<(), String> {
    match status {
        0 => Ok(()),
        100 => Err("the driver sees no GPU".to_owned()),
        status => Err(format!("{} says error {status}", String::from_utf8_lossy(name))),
    }
}

/// Bytes of GPU `index` that are free now, with this process's own context on it already taken off; or why the driver does not
/// say. Makes that context for the moment where there is none yet.
pub fn free_memory(index: usize) -> Result<u64, String> {
    let driver = open(DRIVER)?;
    call!(driver, b"cuInit", c_uint: 0)?;
    let device = device(driver, index)?;
    let (mut context, mut free, mut total) = (std::ptr::null_mut::<c_void>(), 0_usize, 0_usize);
    call!(driver, b"cuDevicePrimaryCtxRetain", *mut *mut c_void: &mut context, c_int: device)?;
    let asked = call!(driver, b"cuCtxPushCurrent_v2", *mut c_void: context).and_then(|()| {
        let asked = call!(driver, b"cuMemGetInfo_v2", *mut usize: &mut free, *mut usize: &mut total);
        call!(driver, b"cuCtxPopCurrent_v2", *mut *mut c_void: &mut context)?;
        asked
    });
    call!(driver, b"cuDevicePrimaryCtxRelease_v2", c_int: device)?;
    asked.map(|()| free as u64)
}

/// `CUdevice_attribute` of the compute capability's two numbers.
const CAPABILITY: [c_int; 2] = [75, 76];

/// What the driver reports of GPU `index` out of `count`.
fn gpu(driver: &Handle, index: usize, count: usize) -> Result<Gpu, String> {
    let (device, mut text, mut memory) = (device(driver, index)?, [0_u8; 128], 0_usize);
    let length = text.len() as c_int;
    call!(driver, b"cuDeviceGetName", *mut c_char: text.as_mut_ptr().cast(), c_int: length, c_int: device)?;
    call!(driver, b"cuDeviceTotalMem_v2", *mut usize: &mut memory, c_int: device)?;
    let mut capability = [0; 2];
    for (number, attribute) in capability.iter_mut().zip(CAPABILITY) {
        call!(driver, b"cuDeviceGetAttribute", *mut c_int: number, c_int: attribute, c_int: device)?;
    }
    let mut peers = Vec::new();
    for other in (0..count).filter(|&other| other != index) {
        let (mut reaches, peer) = (0, self::device(driver, other)?);
        call!(driver, b"cuDeviceCanAccessPeer", *mut c_int: &mut reaches, c_int: device, c_int: peer)?;
        peers.extend((reaches != 0).then_some(other));
    }
    let name = CStr::from_bytes_until_nul(&text).map_err(|why| why.to_string())?;
    Ok(Gpu {
        index,
        name: name.to_string_lossy().into_owned(),
        capability: (capability[0].unsigned_abs(), capability[1].unsigned_abs()),
        memory: memory as u64,
        peers,
        identity: place_on_bus(driver, device),
    })
}

/// Where `device` is on the PCI bus.
fn place_on_bus(driver: &Handle, device: c_int) -> Option<String> {
    let mut text = [0_u8; 64];
    let length = text.len() as c_int;
    let place = text.as_mut_ptr().cast();
    call!(driver, b"cuDeviceGetPCIBusId", *mut c_char: place, c_int: length, c_int: device).ok()?;
    Some(CStr::from_bytes_until_nul(&text).ok()?.to_string_lossy().into_owned())
}

/// The driver's handle of GPU `index`.
fn device(driver: &Handle, index: usize) -> Result<c_int, String> {
    let mut device = 0;
    call!(driver, b"cuDeviceGet", *mut c_int: &mut device, c_int: index as c_int)?;
    Ok(device)
}

/// The file that this process loaded under the name `file`, where the system lists what is loaded.
fn path_of(file: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    // The file may be a link to one whose name ends with the whole version.
    let path = maps.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
    let of_name = |path: &&str| path.rsplit('/').next().is_some_and(|name| name.starts_with(file));
    path.filter(of_name).map(PathBuf::from).next()
}

/// The version of the driver's kernel module, which is the one that users know.
fn kernel_module() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let is_version = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    text.split_whitespace().find(is_version).map(str::to_owned)
}
