//! Row-major f32 matrix product on the CPU, on slices: for operations that build their operands piece by piece.

/// The shape of a product `out[m, n] += a[m, k] b[k, n]`, where a row of `a` starts every `a_stride` elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a_stride: usize,
}

/// Adds `a b` to `out`, on this thread alone.
///
/// # Panics
/// If a slice is too short for the shape: a mistake of the caller, never of a user.
#[allow(unsafe_code)]
pub(crate) fn add_product(shape: Product, a: &[f32], b: &[f32], out: &mut [f32]) {
    let Product { m, n, k, a_stride } = shape;
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    assert!(k <= a_stride && (m - 1) * a_stride + k <= a.len() && k * n <= b.len() && m * n <= out.len());
    // SAFETY: the assertion bounds every element that the product touches; `out` is borrowed mutably, so it does not
    // overlap the others.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            true,
            a.as_ptr(),
            1,
            a_stride as isize,
            b.as_ptr(),
            1,
            n as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
