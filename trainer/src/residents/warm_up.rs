//! What devices prepare while weights are on their way to them: otherwise the first step would wait for it.

use std::ops::Range;
use std::thread;

use kernels::attention::{self, Heads, Passes};
use kernels::{DType, Device};

use crate::error::Result;

/// Does `load` while the devices of `split` open cuDNN and plan forwards of attention over `expected` in `dtype`.
///
/// # Errors
/// Those of `load`: what cannot be planned is reported when it is used.
pub(super) fn beside<T>(
    split: &[(Device, Range<usize>)],
    expected: &[Heads],
    dtype: DType,
    load: impl FnOnce() -> Result<T>,
) -> Result<T> {
    thread::scope(|scope| {
        for (device, _) in split.iter().filter(|_| !expected.is_empty()) {
            scope.spawn(move || {
                for heads in expected {
                    attention::prepare(device, *heads, dtype, Passes::Forward);
                }
            });
        }
        load()
    })
}
