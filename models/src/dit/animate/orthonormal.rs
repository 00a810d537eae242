//! The orthonormal factor of a QR decomposition with LAPACK's signs.

/// Q `[rows, columns]` of the matrix `a`, which is row-major and has at least as many rows as columns.
///
/// Householder reflections as LAPACK's `geqrf` makes them: each diagonal element of R has the sign opposite to its pivot's. A
/// decomposition with a positive diagonal differs in the signs of columns.
pub(super) fn q_factor(a: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    let mut r = a.to_vec();
    let mut reflections: Vec<(Vec<f64>, f64)> = Vec::with_capacity(columns);
    for k in 0..columns.min(rows) {
        let below: f64 = (k + 1..rows).map(|i| r[i * columns + k].powi(2)).sum();
        let pivot = r[k * columns + k];
        let mut v = vec![0.0; rows];
        let mut tau = 0.0;
        if below > 0.0 {
            let diagonal = -(pivot * pivot + below).sqrt().copysign(pivot);
            tau = (diagonal - pivot) / diagonal;
            v[k] = 1.0;
            (k + 1..rows).for_each(|i| v[i] = r[i * columns + k] / (pivot - diagonal));
        }
        reflect(&mut r, columns, &v, tau);
        reflections.push((v, tau));
    }
    let mut q = vec![0.0; rows * columns];
    (0..columns.min(rows)).for_each(|k| q[k * columns + k] = 1.0);
    for (v, tau) in reflections.iter().rev() {
        reflect(&mut q, columns, v, *tau);
    }
    q
}

/// `m` becomes (1 - tau v v^T) m.
fn reflect(m: &mut [f64], columns: usize, v: &[f64], tau: f64) {
    for column in 0..columns {
        let dot: f64 = v.iter().enumerate().map(|(row, v)| v * m[row * columns + column]).sum();
        v.iter().enumerate().for_each(|(row, v)| m[row * columns + column] -= tau * dot * v);
    }
}
