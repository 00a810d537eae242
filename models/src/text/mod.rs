//! From a caption to the DiT's conditioning: cleaned, tokenised, encoded by UMT5.

mod clean;
mod encoder;
mod spiece;
mod tokenizer;

pub use clean::clean;
pub use encoder::TextEncoder;
pub use tokenizer::{MAX_TOKENS, Tokenizer};
