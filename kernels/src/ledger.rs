//! A ledger of the memory of one device: bytes that are allocated, their peak, and what they were at the peak.
//!
//! Tensors of a counted device ([`crate::Device`]) take their bytes from its ledger and give them back when the last of
//! their clones and views is dropped. Real tensors and shadows are counted by the same rules, so a plan that is played on
//! shadows and a step that runs can be compared to the byte.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What an allocation is counted as in a report.
pub type Label = &'static str;

/// The memory of one device. Clones are the same ledger.
#[derive(Debug, Clone)]
pub struct Ledger(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    grain: u64,
    book: Mutex<Book>,
}

#[derive(Debug, Default)]
struct Book {
    live: u64,
    peak: u64,
    /// The index in `by_label` of the label of new allocations.
    current: usize,
    /// A dozen labels: looking through them is faster than any map.
    by_label: Vec<(Label, u64)>,
    at_peak: Vec<(Label, u64)>,
    /// By label and bytes, where that is counted: how many are alive, and the most that were.
    sizes: Option<BTreeMap<(Label, u64), (usize, usize)>>,
    /// Whether nothing was dropped since the peak.
    is_at_peak: bool,
}

/// Bytes of a ledger that are taken until this is dropped.
#[derive(Debug)]
pub struct Allocation {
    ledger: Ledger,
    label: AtomicUsize,
    bytes: u64,
}

/// What a piece of work had allocated at its peak, beyond what was allocated when it began.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    above: u64,
    by_label: Vec<(Label, i64)>,
}

/// The label of allocations without one.
const UNLABELLED: Label = "activations";

impl Ledger {
    /// An empty ledger, which rounds allocations up to multiples of `grain` bytes.
    pub fn new(grain: u64) -> Self {
        let book = Book { by_label: vec![(UNLABELLED, 0)], ..Book::default() };
        Self(Arc::new(Inner { grain, book: Mutex::new(book) }))
    }

    /// An empty ledger that also counts how many allocations of each size there are at once. Its allocations keep their labels.
    pub fn with_sizes(grain: u64) -> Self {
        let ledger = Self::new(grain);
        ledger.book().sizes = Some(BTreeMap::new());
        ledger
    }

    /// Sets the label of new allocations, and returns the one before.
    pub fn set_label(&self, label: Label) -> Label {
        let mut book = self.book();
        let at = book.place(label);
        let before = std::mem::replace(&mut book.current, at);
        book.by_label[before].0
    }

    /// Takes `bytes`, counted as the current label.
    pub fn take(&self, bytes: u64) -> Allocation {
        let current = self.book().current;
        self.take_at(current, bytes)
    }

    /// Takes `bytes`, counted as `label`.
    pub fn take_as(&self, label: Label, bytes: u64) -> Allocation {
        let at = self.book().place(label);
        self.take_at(at, bytes)
    }

    fn take_at(&self, at: usize, bytes: u64) -> Allocation {
        let bytes = bytes.next_multiple_of(self.0.grain);
        let mut book = self.book();
        let label = book.by_label[at].0;
        if let Some(sizes) = &mut book.sizes {
            let (alive, most) = sizes.entry((label, bytes)).or_default();
            *alive += 1;
            *most = (*most).max(*alive);
        }
        book.live += bytes;
        book.by_label[at].1 += bytes;
        if book.live > book.peak {
            (book.peak, book.is_at_peak) = (book.live, true);
        }
        drop(book);
        Allocation { ledger: self.clone(), label: AtomicUsize::new(at), bytes }
    }

    /// Bytes that are alive.
    pub fn live(&self) -> u64 {
        self.book().live
    }

    /// The most bytes that were alive at once.
    pub fn peak(&self) -> u64 {
        self.book().peak
    }

    /// Runs `work`, and returns what it had allocated at its peak. The ledger's own peak is not affected by the measurement.
    pub fn traced<T>(&self, work: impl FnOnce() -> T) -> (T, Trace) {
        let (live, by_label, outer) = {
            let mut book = self.book();
            book.note_peak();
            let outer = (book.peak, std::mem::take(&mut book.at_peak));
            (book.peak, book.is_at_peak) = (book.live, true);
            (book.live, book.by_label.clone(), outer)
        };
        let result = work();
        let mut book = self.book();
        book.note_peak();
        let before =
            |label: Label| by_label.iter().find(|(of, _)| *of == label).map_or(0, |(_, bytes)| *bytes);
        let grown = book
            .at_peak
            .iter()
            .map(|(label, bytes)| (*label, bytes.cast_signed() - before(label).cast_signed()));
        let trace =
            Trace { above: book.peak - live, by_label: grown.filter(|(_, bytes)| *bytes != 0).collect() };
        if outer.0 >= book.peak {
            (book.peak, book.at_peak) = outer;
        }
        drop(book);
        (result, trace)
    }

    /// Counts as if the work of `trace` were done again, up to its results.
    pub fn replay(&self, trace: &Trace) {
        let mut book = self.book();
        let peak = book.live + trace.above;
        if peak > book.peak {
            book.note_peak();
            book.peak = peak;
            let mut at_peak = book.by_label.clone();
            for (label, more) in &trace.by_label {
                match at_peak.iter_mut().find(|(of, _)| of == label) {
                    Some((_, bytes)) => *bytes = bytes.saturating_add_signed(*more),
                    None => at_peak.push((label, more.unsigned_abs())),
                }
            }
            book.at_peak = at_peak;
        }
    }

    /// Resets the peak to what is allocated now.
    pub fn reset_peak(&self) {
        let mut book = self.book();
        (book.peak, book.is_at_peak) = (book.live, true);
        for (alive, most) in book.sizes.iter_mut().flat_map(BTreeMap::values_mut) {
            *most = *alive;
        }
    }

    /// What was alive at the peak, by label.
    pub fn at_peak(&self) -> Vec<(Label, u64)> {
        let mut book = self.book();
        book.note_peak();
        book.at_peak.clone()
    }

    /// The allocations counted as `label`: their sizes in bytes, the largest first, and the most of each that were alive at
    /// once. Empty for a ledger that does not count sizes.
    pub fn sizes(&self, label: Label) -> Vec<(u64, usize)> {
        let book = self.book();
        let all = book.sizes.iter().flatten().rev();
        all.filter(|((of, _), (_, most))| *of == label && *most > 0)
            .map(|((_, bytes), (_, most))| (*bytes, *most))
            .collect()
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.0.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Book {
    /// The place of `label` in the list.
    fn place(&mut self, label: Label) -> usize {
        self.by_label.iter().position(|(other, _)| *other == label).unwrap_or_else(|| {
            self.by_label.push((label, 0));
            self.by_label.len() - 1
        })
    }

    /// Notes what is alive, where that is the most so far: called before it changes.
    fn note_peak(&mut self) {
        if std::mem::take(&mut self.is_at_peak) {
            self.at_peak.clone_from(&self.by_label);
        }
    }
}

impl Allocation {
    /// Its bytes, a multiple of the ledger's grain.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What it is counted as.
    pub fn label(&self) -> Label {
        self.ledger.book().by_label[self.label.load(Ordering::Relaxed)].0
    }

    /// Counts it as `label` from now on.
    pub fn relabel(&self, label: Label) {
        let mut book = self.ledger.book();
        let to = book.place(label);
        let from = self.label.swap(to, Ordering::Relaxed);
        book.by_label[from].1 -= self.bytes;
        book.by_label[to].1 += self.bytes;
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let mut book = self.ledger.book();
        book.note_peak();
        let at = self.label.load(Ordering::Relaxed);
        book.live -= self.bytes;
        book.by_label[at].1 -= self.bytes;
        let key = (book.by_label[at].0, self.bytes);
        if let Some((alive, _)) = book.sizes.as_mut().and_then(|sizes| sizes.get_mut(&key)) {
            *alive -= 1;
        }
    }
}
