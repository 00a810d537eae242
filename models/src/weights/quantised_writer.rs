//! Writes a file of quantised matrices behind the load that makes them, on a thread of its own.
//!
//! The file has a temporary name until all of it is on the disk: a process that ends before leaves no file that another would read.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kernels::fill::PIECE;
use kernels::transfer::HostStore;
use kernels::{Device, Tensor};
use xxhash_rust::xxh3::xxh3_64;

use super::quantised_file::{CHANGED, Layout, Part, Place, Stored};
use super::write::{Temporary, sync_folder, temporary_file};

/// A matrix that was quantised, in host memory.
pub(super) struct Made {
    pub name: String,
    pub place: Place,
    pub codes: Vec<u8>,
    pub scale: Vec<u8>,
}

/// A file that is being written. Dropped before [`Self::finish`], it leaves nothing.
#[derive(Debug)]
pub(super) struct Writer {
    queue: Mutex<Option<Sender<Made>>>,
    thread: Mutex<Option<JoinHandle<Result<Begun, String>>>>,
    waiting: Arc<Waiting>,
    /// Through which codes come from each device.
    stores: Mutex<Vec<(Device, HostStore)>>,
}

/// What of the file is written.
#[derive(Debug)]
struct Begun {
    temporary: Temporary,
    file: File,
    hashes: Vec<u64>,
    done: BTreeSet<String>,
}

/// Bytes of the matrices that wait for the disk.
#[derive(Debug)]
struct Waiting {
    most: u64,
    bytes: Mutex<u64>,
    less: Condvar,
    /// Nobody wants the file any more.
    is_given_up: AtomicBool,
}

impl Made {
    fn bytes(&self) -> u64 {
        (self.codes.len() + self.scale.len()) as u64
    }
}

impl Waiting {
    /// Counts `bytes` that come, once there is room; alone they always have it.
    fn add(&self, bytes: u64) {
        let mut waiting = lock(&self.bytes);
        while *waiting > 0 && *waiting + bytes > self.most {
            waiting = self.less.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        *waiting += bytes;
    }

    fn remove(&self, bytes: u64) {
        *lock(&self.bytes) -= bytes;
        self.less.notify_all();
    }
}

impl Writer {
    /// Begins the file of `layout` that will be at `path`; matrices of `most` bytes may wait for the disk.
    pub fn begin(path: &Path, layout: &Layout, most: u64) -> std::io::Result<Self> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let (temporary, file) = temporary_file(path)?;
        file.write_all_at(&layout.head, 0)?;
        file.set_len(layout.bytes)?;
        let hashes = vec![0; layout.hashes.bytes / size_of::<u64>()];
        let begun = Begun { temporary, file, hashes, done: BTreeSet::new() };
        let (queue, made) = channel();
        let waiting =
            Waiting { most, bytes: Mutex::default(), less: Condvar::new(), is_given_up: false.into() };
        let waiting = Arc::new(waiting);
        let thread = std::thread::Builder::new().name("quantised weights to disk".to_owned());
        let thread = thread.spawn({
            let waiting = waiting.clone();
            move || begun.write_all(&made, &waiting)
        })?;
        let (queue, thread) = (Mutex::new(Some(queue)), Mutex::new(Some(thread)));
        Ok(Self { queue, thread, waiting, stores: Mutex::default() })
    }

    /// The bytes of `codes` in host memory; only what makes them is waited for.
    pub fn codes(&self, codes: &Tensor) -> kernels::Result<Vec<u8>> {
        let store = self.store(codes.device())?;
        let bytes = store.park(codes.clone())?.into_bytes()?;
        // The copy has ended, so that this frees what the store holds of the device's memory.
        store.next_group()?;
        bytes.ok_or_else(|| kernels::Error::msg("a shadow has no codes to write"))
    }

    fn store(&self, device: &Device) -> kernels::Result<HostStore> {
        let mut stores = lock(&self.stores);
        if let Some((_, store)) = stores.iter().find(|(of, _)| of.same_device(device)) {
            return Ok(store.clone());
        }
        let store = HostStore::unreserved(device)?;
        stores.push((device.clone(), store.clone()));
        Ok(store)
    }

    /// Has `made` written; waits where more than may would wait.
    pub fn queue(&self, made: Made) {
        let bytes = made.bytes();
        self.waiting.add(bytes);
        let queue = lock(&self.queue).clone();
        // After a failure nobody takes it, and `finish` says why.
        if queue.is_none_or(|queue| queue.send(made).is_err()) {
            self.waiting.remove(bytes);
        }
    }

    /// Waits until all that was queued is written, adds the matrices of the file `stored`, and puts the new one in its place.
    pub fn finish(&self, path: &Path, layout: &Layout, stored: Option<&Stored>) -> Result<(), String> {
        let mut begun = self.join()?;
        for (name, place) in &layout.matrices {
            if !begun.done.contains(name) {
                let stored = stored.ok_or_else(|| format!("`{name}` was not read"))?;
                begun.copy(stored, [&place.codes, &place.scale]).map_err(|why| format!("`{name}`: {why}"))?;
            }
        }
        let Begun { temporary, file, hashes, .. } = begun;
        let hashes: Vec<u8> = hashes.iter().flat_map(|hash| hash.to_le_bytes()).collect();
        file.write_all_at(&hashes, layout.hashes.offset).map_err(told)?;
        file.sync_all().map_err(told)?;
        temporary.rename_to(path).map_err(told)?;
        sync_folder(path).map_err(|error| error.to_string())
    }

    fn join(&self) -> Result<Begun, String> {
        *lock(&self.queue) = None;
        lock(&self.stores).clear();
        let thread = lock(&self.thread).take().ok_or("it was ended before")?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Of a load that ended early: what the thread wrote goes with it.
        self.waiting.is_given_up.store(true, Ordering::Relaxed);
        let _ = self.join();
    }
}

impl Begun {
    /// Writes what comes until nothing more does.
    fn write_all(mut self, made: &Receiver<Made>, waiting: &Waiting) -> Result<Self, String> {
        let mut failure = None;
        while let Ok(matrix) = made.recv() {
            // After a failure the load goes on, and what it quantises is dropped.
            if failure.is_none() && !waiting.is_given_up.load(Ordering::Relaxed) {
                failure = self.write(&matrix).err();
            }
            waiting.remove(matrix.bytes());
        }
        failure.map_or(Ok(self), |why| Err(why.to_string()))
    }

    fn write(&mut self, Made { name, place, codes, scale }: &Made) -> std::io::Result<()> {
        self.put(&place.codes, codes)?;
        self.put(&place.scale, scale)?;
        self.done.insert(name.clone());
        Ok(())
    }

    /// Writes the bytes of a part, and notes the hashes of its pieces.
    fn put(&mut self, part: &Part, bytes: &[u8]) -> std::io::Result<()> {
        if bytes.len() != part.bytes {
            let why = format!("{} bytes instead of {}", bytes.len(), part.bytes);
            return Err(std::io::Error::other(why));
        }
        for (n, piece) in bytes.chunks(PIECE).enumerate() {
            self.file.write_all_at(piece, part.offset + (n * PIECE) as u64)?;
            self.hashes[part.first + n] = xxh3_64(piece);
        }
        Ok(())
    }

    /// Copies `parts` of another file of this layout.
    fn copy(&mut self, (from, hashes): &Stored, parts: [&Part; 2]) -> Result<(), String> {
        for part in parts {
            let bytes = from.bytes_at(part.offset, part.bytes).map_err(|error| error.to_string())?;
            self.put(part, &bytes).map_err(told)?;
            let of_part = part.first..part.first + bytes.chunks(PIECE).len();
            if self.hashes[of_part.clone()] != hashes[of_part] {
                return Err(CHANGED.to_owned());
            }
        }
        Ok(())
    }
}

fn told(error: std::io::Error) -> String {
    error.to_string()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
