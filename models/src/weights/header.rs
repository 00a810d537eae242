//! The header of a safetensors file, read and checked before any length in it is trusted.
//!
//! Format: 8 bytes little-endian length, that many bytes of JSON `{name: {dtype, shape, data_offsets}}` with an
//! optional `__metadata__` of strings, then the tensors without gaps. Source: the safetensors format description.

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use std::collections::BTreeMap;

use super::dtype::StoredDType;
use super::entry::{Entry, checked_elements};
use super::error::{Result, WeightsError};
use super::stored::StoredFile;

/// The format's own bound on its header.
const MAX_HEADER: u64 = 100_000_000;

const AGAIN: &str = "the download is damaged or incomplete, fetch this file again";

/// Tensors and metadata of one safetensors file.
#[derive(Debug)]
pub(crate) struct Header {
    pub entries: BTreeMap<String, Entry>,
    pub metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TensorInfo {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// The JSON of a header; duplicate names are refused.
#[derive(Default)]
struct Json {
    tensors: Vec<(String, TensorInfo)>,
    metadata: BTreeMap<String, String>,
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Json;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a map of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
                let mut json = Json::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        json.metadata = map.next_value()?;
                    } else {
                        json.tensors.push((name, map.next_value()?));
                    }
                }
                Ok(json)
            }
        }
        deserializer.deserialize_map(Names)
    }
}

/// Reads and checks the header of `file`; its entries get the file number `number`.
pub(crate) fn read(file: &StoredFile, number: usize) -> Result<Header> {
    let (path, file_bytes) = (file.path(), file.length()?);
    let mut length = [0u8; 8];
    if file_bytes < 8 {
        let reason = format!("{file_bytes} bytes is too short for a safetensors file; {AGAIN}");
        return Err(WeightsError::file(path, reason));
    }
    file.read_at(0, &mut length)?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > file_bytes - 8 || header_bytes > MAX_HEADER {
        let reason = format!(
            "the header claims {header_bytes} bytes, the file has {file_bytes}: not a safetensors file, or {AGAIN}"
        );
        return Err(WeightsError::file(path, reason));
    }
    let text = file.bytes_at(8, header_bytes as usize)?;
    let json: Json = serde_json::from_slice(&text).map_err(|e| {
        WeightsError::file(path, format!("the safetensors header is not valid ({e}); {AGAIN}"))
    })?;
    check(json, number, 8 + header_bytes, file_bytes).map_err(|reason| WeightsError::file(path, reason))
}

/// Checks every tensor's byte range: its length is that of shape and type, and the ranges cover the file exactly.
fn check(json: Json, file: usize, data_start: u64, file_bytes: u64) -> Result<Header, String> {
    let data_bytes = file_bytes - data_start;
    let mut ranges = Vec::with_capacity(json.tensors.len());
    let mut entries = BTreeMap::new();
    for (name, info) in json.tensors {
        let (begin, end) = info.data_offsets;
        let dtype = StoredDType::from_name(&info.dtype).ok_or_else(|| {
            format!("tensor `{name}` has the dtype {}, which Tandem cannot read", info.dtype)
        })?;
        if begin > end || end > data_bytes {
            return Err(format!(
                "tensor `{name}` is at bytes {begin}..{end} of {data_bytes}: the file is truncated; {AGAIN}"
            ));
        }
        let expected = checked_elements(&info.shape).and_then(|n| n.checked_mul(dtype.size()));
        if expected.map(|n| n as u64) != Some(end - begin) {
            return Err(format!(
                "tensor `{name}` of shape {:?} {dtype} does not fill its {} bytes; {AGAIN}",
                info.shape,
                end - begin
            ));
        }
        ranges.push((begin, end, name.clone()));
        let entry = Entry { dtype, shape: info.shape, file, offset: data_start + begin, strides: None };
        if entries.insert(name.clone(), entry).is_some() {
            return Err(format!("the tensor `{name}` is in the header twice; {AGAIN}"));
        }
    }
    check_cover(ranges, data_bytes)?;
    Ok(Header { entries, metadata: json.metadata })
}

fn check_cover(mut ranges: Vec<(u64, u64, String)>, data_bytes: u64) -> Result<(), String> {
    ranges.sort();
    let mut covered = 0;
    for (begin, end, name) in ranges {
        if begin < covered {
            return Err(format!("tensor `{name}` overlaps the one before it; {AGAIN}"));
        }
        if begin > covered {
            return Err(format!(
                "there is a hole of {} bytes before tensor `{name}`; {AGAIN}",
                begin - covered
            ));
        }
        covered = end;
    }
    match covered == data_bytes {
        true => Ok(()),
        false => Err(format!("the tensors take {covered} bytes, the file holds {data_bytes}; {AGAIN}")),
    }
}
