//! Opens shared libraries of CUDA by name at run time.

// Opening a library runs its set-up, which the compiler cannot check.
#![allow(unsafe_code)]

use libloading::Library;

/// Loads `file`, such as `libcudnn.so.9`, for as long as the process lives: some of these libraries keep threads of their own.
///
/// A build with CUDA looks where NVIDIA's packages look: NVIDIA's wheels beside this program, then in the active Python
/// environment, conda's folder, what the system finds, the toolkit (`build/late.c`). Others look where the system does.
///
/// # Errors
/// The loader's words.
pub(crate) fn open(file: &str) -> Result<&'static Library, String> {
    opened(file).map(|library| &*Box::leak(Box::new(library)))
}

#[cfg(late)]
fn opened(file: &str) -> Result<Library, String> {
    use std::ffi::{CString, c_char, c_void};

    // SAFETY: the function of `build/late.c`, which reads a name that ends with nul.
    unsafe extern "C" {
        fn tandem_late_open(file: *const c_char) -> *mut c_void;
    }
    let name = CString::new(file).map_err(|why| why.to_string())?;
    // SAFETY: NVIDIA's libraries promise that loading them runs nothing but their own set-up.
    let handle = unsafe { tandem_late_open(name.as_ptr()) };
    if handle.is_null() {
        return system(file);
    }
    // SAFETY: a handle of dlopen that nobody closes.
    Ok(unsafe { libloading::os::unix::Library::from_raw(handle) }.into())
}

#[cfg(not(late))]
fn opened(file: &str) -> Result<Library, String> {
    system(file)
}

fn system(file: &str) -> Result<Library, String> {
    // SAFETY: NVIDIA's libraries promise that loading them runs nothing but their own set-up.
    unsafe { Library::new(file) }.map_err(in_words)
}

/// An error with its causes.
pub(crate) fn in_words(error: libloading::Error) -> String {
    std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string)
}
