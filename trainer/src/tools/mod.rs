//! What looks at things and measures them: bench, probe, doctor, inspect; and launch, which starts replicas.

pub mod bench;
pub mod captioning;
pub mod captions;
pub mod checks;
pub mod comparison;
pub mod doctor;
pub mod inspect;
pub mod launch;
pub mod probe;
pub mod quality;
