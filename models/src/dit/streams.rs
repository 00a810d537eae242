//! The residual streams of a model.

use std::collections::BTreeMap;

use kernels::Tensor;

/// The residual streams between two layers, or their gradients: the main one, and those of side chains by name.
#[derive(Debug, Clone)]
pub struct Streams<T = Tensor> {
    /// The main stream [b, l, d], which begins as the tokens of the latents and ends at the head.
    pub main: T,
    side: BTreeMap<&'static str, T>,
}

impl<T> Streams<T> {
    /// The main stream alone.
    pub fn new(main: T) -> Self {
        Self { main, side: BTreeMap::new() }
    }

    /// The same with the side stream `name`.
    pub fn with(mut self, name: &'static str, stream: T) -> Self {
        self.put(name, stream);
        self
    }

    /// Inserts the side stream `name`; replaces an earlier one.
    pub fn put(&mut self, name: &'static str, stream: T) {
        self.side.insert(name, stream);
    }

    /// Removes and returns the side stream `name`.
    pub fn take(&mut self, name: &'static str) -> Option<T> {
        self.side.remove(name)
    }

    /// The side streams, ordered by name.
    pub fn sides(&self) -> impl Iterator<Item = (&'static str, &T)> {
        self.side.iter().map(|(name, stream)| (*name, stream))
    }

    /// Every stream through `f`, the main one first.
    ///
    /// # Errors
    /// The first of `f`.
    pub fn try_map<U, E>(self, mut f: impl FnMut(T) -> Result<U, E>) -> Result<Streams<U>, E> {
        let main = f(self.main)?;
        let side = self.side.into_iter().map(|(name, stream)| Ok((name, f(stream)?)));
        Ok(Streams { main, side: side.collect::<Result<_, E>>()? })
    }
}
