//! `.pth` files: a zip archive of a pickled `{name: tensor}` dictionary and the storages it refers to.
//!
//! Entries are stored, not compressed, so that a tensor is a range of the file, read by seeking.
//! Source: PyTorch's `torch/serialization.py`, the zip-file format.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;

use zip::{CompressionMethod, ZipArchive};

use super::entry::{Entry, checked_elements, is_row_major, span};
use super::error::{Result, WeightsError};
use super::pickle::{self, View};
use super::stored::StoredFile;

/// A pickle describes tensors in a few dozen bytes each: more than this is no checkpoint.
const MAX_PICKLE: u64 = 64 << 20;

/// Byte range of an archive member inside the file.
struct Member {
    start: u64,
    bytes: u64,
}

/// Reads the table of tensors of `file`; the entries get the file number `number`.
pub(crate) fn read(file: &StoredFile, number: usize) -> Result<BTreeMap<String, Entry>> {
    let (path, file_bytes) = (file.path(), file.length()?);
    let refused = |reason: String| WeightsError::file(path, reason);
    // The archive's reader moves its place in the file, so it has a handle of its own.
    let handle = File::open(path).map_err(WeightsError::io("open", path))?;
    let mut archive = ZipArchive::new(BufReader::new(handle)).map_err(|e| {
        refused(format!("the zip archive of this .pth is damaged or cut off ({e}); fetch it again"))
    })?;
    let members = members(&mut archive, file_bytes).map_err(refused)?;
    let (root, pickle) = find_pickle(&members).map_err(refused)?;
    if pickle.bytes > MAX_PICKLE {
        return Err(refused(format!("its pickle has {} bytes: this is no tensor dictionary", pickle.bytes)));
    }
    let text = read_range(file, pickle)?;
    if let Some(order) = members.get(&format!("{root}byteorder"))
        && order.bytes <= 16
        && read_range(file, order)? != b"little"
    {
        return Err(refused(
            "it was saved on a big-endian machine; save it again on a common one".to_owned(),
        ));
    }
    let views = pickle::read(&text).map_err(refused)?;
    entries(views, &root, &members, number).map_err(refused)
}

fn members(
    archive: &mut ZipArchive<BufReader<File>>,
    file_bytes: u64,
) -> Result<BTreeMap<String, Member>, String> {
    let mut members = BTreeMap::new();
    for i in 0..archive.len() {
        let entry = archive
            .by_index_raw(i)
            .map_err(|e| format!("its zip archive is damaged ({e}); fetch it again"))?;
        let (name, bytes) = (entry.name().to_owned(), entry.size());
        if entry.compression() != CompressionMethod::Stored
            || entry.encrypted()
            || entry.compressed_size() != bytes
        {
            return Err(format!("its member `{name}` is compressed; save it again with torch.save"));
        }
        let start =
            entry.data_start().ok_or_else(|| format!("its member `{name}` has no place in the file"))?;
        if start.checked_add(bytes).is_none_or(|end| end > file_bytes) {
            return Err(format!(
                "its member `{name}` reaches past the end: the file is cut off; fetch it again"
            ));
        }
        members.insert(name, Member { start, bytes });
    }
    Ok(members)
}

/// The archive's folder (with its slash) and its pickle.
fn find_pickle(members: &BTreeMap<String, Member>) -> Result<(String, &Member), String> {
    let mut pickles = members.iter().filter(|(name, _)| *name == "data.pkl" || name.ends_with("/data.pkl"));
    match (pickles.next(), pickles.next()) {
        (Some((name, member)), None) => Ok((name.trim_end_matches("data.pkl").to_owned(), member)),
        _ => Err("this zip archive holds no PyTorch checkpoint (no single data.pkl)".to_owned()),
    }
}

fn read_range(file: &StoredFile, member: &Member) -> Result<Vec<u8>> {
    file.bytes_at(member.start, member.bytes as usize)
}

fn entries(
    views: Vec<(String, View)>,
    root: &str,
    members: &BTreeMap<String, Member>,
    file: usize,
) -> Result<BTreeMap<String, Entry>, String> {
    let mut entries = BTreeMap::new();
    for (name, view) in views {
        let storage = members
            .get(&format!("{root}data/{}", view.key))
            .ok_or_else(|| format!("tensor `{name}` has no data in the archive; fetch the file again"))?;
        let entry = place(view, storage, file)
            .ok_or_else(|| format!("tensor `{name}` reaches outside its storage; fetch the file again"))?;
        if entries.insert(name.clone(), entry).is_some() {
            return Err(format!("the tensor `{name}` is in the file twice; save it again"));
        }
    }
    Ok(entries)
}

/// Turns a view of a storage into a place in the file; `None` if the view does not lie within the storage.
fn place(view: View, storage: &Member, file: usize) -> Option<Entry> {
    let size = view.dtype.size() as u64;
    let capacity = storage.bytes / size;
    let end = (view.offset as u64).checked_add(span(&view.shape, &view.strides)? as u64)?;
    // More elements than the storage holds would be a broadcast view: no weight is one.
    if end > capacity || checked_elements(&view.shape)? as u64 > capacity {
        return None;
    }
    let row_major = is_row_major(&view.shape, &view.strides);
    Some(Entry {
        dtype: view.dtype,
        offset: storage.start + view.offset as u64 * size,
        strides: (!row_major).then_some(view.strides),
        shape: view.shape,
        file,
    })
}
