//! The identity of a layer of a model.

use std::fmt;

/// A layer of a model by its chain and its number in it. Its [`Display`](fmt::Display) is the prefix of the names of its
/// tensors, such as `blocks.3`.
///
/// The order is by chain, then by number; the order in which layers run is the
/// [`Architecture`](super::Architecture)'s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerId {
    chain: &'static str,
    index: usize,
}

impl LayerId {
    /// The chain of the main blocks.
    pub const BLOCKS: &'static str = "blocks";
    /// The chain of VACE's side blocks.
    pub const SIDE_BLOCKS: &'static str = "vace_blocks";

    /// The chain of Animate's face blocks.
    pub const FACE_BLOCKS: &'static str = "face_adapter.fuser_blocks";
    /// The chain of S2V's audio injections.
    pub const INJECTIONS: &'static str = "audio_injector.injector";

    /// Layer `index` of `chain`, the prefix of its tensors' names before the number (`vace_blocks`).
    pub const fn new(chain: &'static str, index: usize) -> Self {
        Self { chain, index }
    }

    /// Main block `index`.
    pub const fn block(index: usize) -> Self {
        Self::new(Self::BLOCKS, index)
    }

    /// Side block `index`.
    pub const fn side(index: usize) -> Self {
        Self::new(Self::SIDE_BLOCKS, index)
    }

    /// Face block `index`.
    pub const fn face(index: usize) -> Self {
        Self::new(Self::FACE_BLOCKS, index)
    }

    /// Audio injection `index`.
    pub const fn injection(index: usize) -> Self {
        Self::new(Self::INJECTIONS, index)
    }

    /// The prefix of its tensors' names before the number.
    pub fn chain(self) -> &'static str {
        self.chain
    }

    /// Its number in its chain.
    pub fn index(self) -> usize {
        self.index
    }

    /// The rest of `name` after this layer's own name and a dot: `self_attn.q` of `blocks.3.self_attn.q`. `None` for names of
    /// other layers.
    pub fn local(self, name: &str) -> Option<&str> {
        let (index, local) = name.strip_prefix(self.chain)?.strip_prefix('.')?.split_once('.')?;
        (index.parse() == Ok(self.index)).then_some(local)
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}.{}", self.chain, self.index)
    }
}
