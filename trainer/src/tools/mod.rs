//! What looks at things and measures them: bench, probe, doctor, inspect.

pub mod bench;
pub mod doctor;
pub mod inspect;
pub mod probe;
pub mod quality;
