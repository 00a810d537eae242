//! A pretend allocator: it counts what would be alive, and remembers what was when it was most.
//!
//! Shadows are taken and dropped by the same rules as tensors, so code that mirrors the model's code line by line needs
//! no bookkeeping of its own.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use kernels::DType;

/// What an item is counted as.
pub(super) type Name = &'static str;

/// The pretend memory of one device.
#[derive(Debug, Clone)]
pub(super) struct Ledger {
    book: Rc<RefCell<Book>>,
    grain: u64,
}

#[derive(Debug, Default)]
struct Book {
    live: u64,
    peak: u64,
    /// A dozen of names: looking through them is faster than any map.
    by_name: Vec<(Name, u64)>,
    at_peak: Vec<(Name, u64)>,
    /// By name and bytes, where that is counted: how many are alive, and the most that were.
    sizes: Option<BTreeMap<(Name, u64), (usize, usize)>>,
    /// Whether nothing was dropped since the peak.
    is_at_peak: bool,
}

impl Book {
    fn count(&mut self, name: Name) -> &mut u64 {
        let at = self.by_name.iter().position(|(other, _)| *other == name).unwrap_or_else(|| {
            self.by_name.push((name, 0));
            self.by_name.len() - 1
        });
        &mut self.by_name[at].1
    }

    /// Notes what is alive, where that is the most so far: called before it changes.
    fn note_peak(&mut self) {
        if std::mem::take(&mut self.is_at_peak) {
            self.at_peak.clone_from(&self.by_name);
        }
    }
}

/// Bytes that are taken until this is dropped.
#[derive(Debug)]
pub(super) struct Held {
    ledger: Ledger,
    name: Cell<Name>,
    bytes: u64,
}

/// A tensor without numbers. Clones and views share its memory, as a tensor's do.
#[derive(Debug, Clone)]
pub(super) struct Shadow {
    /// How many numbers it has.
    pub numbers: u64,
    /// What they are.
    pub dtype: DType,
    held: Rc<Held>,
}

impl Ledger {
    /// An empty one, which hands out multiples of `grain` bytes.
    pub fn new(grain: u64) -> Self {
        Self { book: Rc::default(), grain }
    }

    /// An empty one that also counts how many items of each size there are at once. Its items keep their names.
    pub fn with_sizes(grain: u64) -> Self {
        let ledger = Self::new(grain);
        ledger.book.borrow_mut().sizes = Some(BTreeMap::new());
        ledger
    }

    /// The items counted under `name`: their sizes in bytes, the largest first, and the most of each that were alive at once.
    pub fn sizes(&self, name: Name) -> Vec<(u64, usize)> {
        let book = self.book.borrow();
        let all = book.sizes.iter().flatten().rev();
        all.filter(|((of, _), _)| *of == name).map(|((_, bytes), (_, most))| (*bytes, *most)).collect()
    }

    /// Takes `bytes`, counted under `name`.
    pub fn take(&self, name: Name, bytes: u64) -> Held {
        let bytes = bytes.next_multiple_of(self.grain);
        let mut book = self.book.borrow_mut();
        if let Some(sizes) = &mut book.sizes {
            let (alive, most) = sizes.entry((name, bytes)).or_default();
            *alive += 1;
            *most = (*most).max(*alive);
        }
        book.live += bytes;
        *book.count(name) += bytes;
        if book.live > book.peak {
            (book.peak, book.is_at_peak) = (book.live, true);
        }
        drop(book);
        Held { ledger: self.clone(), name: Cell::new(name), bytes }
    }

    /// A new tensor.
    pub fn tensor(&self, name: Name, numbers: u64, dtype: DType) -> Shadow {
        let held = self.take(name, numbers * dtype.size_in_bytes() as u64);
        Shadow { numbers, dtype, held: Rc::new(held) }
    }

    /// The most that was alive at once.
    pub fn peak(&self) -> u64 {
        self.book.borrow().peak
    }

    /// What was alive then, by name.
    pub fn at_peak(&self) -> Vec<(Name, u64)> {
        let mut book = self.book.borrow_mut();
        book.note_peak();
        book.at_peak.clone()
    }
}

impl Held {
    /// Counts it under `name` from now on.
    pub fn rename(&self, name: Name) {
        let mut book = self.ledger.book.borrow_mut();
        *book.count(self.name.get()) -= self.bytes;
        *book.count(name) += self.bytes;
        self.name.set(name);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut book = self.ledger.book.borrow_mut();
        book.note_peak();
        book.live -= self.bytes;
        *book.count(self.name.get()) -= self.bytes;
        let key = (self.name.get(), self.bytes);
        if let Some((alive, _)) = book.sizes.as_mut().and_then(|sizes| sizes.get_mut(&key)) {
            *alive -= 1;
        }
    }
}

impl Shadow {
    /// A part of it, in the same memory.
    pub fn view(&self, numbers: u64) -> Self {
        Self { numbers, ..self.clone() }
    }

    /// Its bytes.
    pub fn bytes(&self) -> u64 {
        self.numbers * self.dtype.size_in_bytes() as u64
    }

    /// The same memory, counted under `name` from now on.
    pub fn renamed(self, name: Name) -> Self {
        self.held.rename(name);
        self
    }
}
