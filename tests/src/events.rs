//! TensorBoard files, read by wire type alone: independent of the writer.

use std::path::Path;

/// A field of a protocol buffer, read by wire type alone: an independent reader of what the writer made.
#[derive(Debug, Clone, PartialEq)]
pub enum Field {
    /// A varint, or the bits of a fixed-width number.
    Number(u64),
    /// A string, bytes, or a message within the message.
    Bytes(Vec<u8>),
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let (mut value, mut shift) = (0, 0);
    loop {
        let (byte, rest) = bytes.split_first().unwrap();
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            return value;
        }
    }
}

fn take<'a>(bytes: &mut &'a [u8], n: usize) -> &'a [u8] {
    let (head, rest) = bytes.split_at(n);
    *bytes = rest;
    head
}

/// The fields of a message by number, in order.
pub fn fields(mut bytes: &[u8]) -> Vec<(u64, Field)> {
    let mut out = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let field = match key & 7 {
            0 => Field::Number(varint(&mut bytes)),
            1 => Field::Number(u64::from_le_bytes(take(&mut bytes, 8).try_into().unwrap())),
            2 => {
                let n = varint(&mut bytes) as usize;
                Field::Bytes(take(&mut bytes, n).to_vec())
            }
            5 => Field::Number(u64::from(u32::from_le_bytes(take(&mut bytes, 4).try_into().unwrap()))),
            wire => panic!("wire type {wire}"),
        };
        out.push((key >> 3, field));
    }
    out
}

/// The bytes of a field that holds some.
pub fn bytes_of(field: &Field) -> &[u8] {
    match field {
        Field::Bytes(bytes) => bytes,
        Field::Number(n) => panic!("{n} where bytes were expected"),
    }
}

/// The events of a file: (step, fields of the event).
pub fn events(path: &Path) -> Vec<(u64, Vec<(u64, Field)>)> {
    let file = std::fs::read(path).unwrap();
    let (mut rest, mut out) = (file.as_slice(), Vec::new());
    while !rest.is_empty() {
        let length = u64::from_le_bytes(take(&mut rest, 8).try_into().unwrap()) as usize;
        take(&mut rest, 4);
        let event = fields(take(&mut rest, length));
        take(&mut rest, 4);
        let step = event.iter().find(|(n, _)| *n == 2).map(|(_, f)| f.clone());
        let Some(Field::Number(step)) = step else { panic!("no step") };
        out.push((step, event));
    }
    out
}

/// Every value of a file: (step, tag, field of the value with its number), in order.
fn values(path: &Path) -> Vec<(u64, String, (u64, Field))> {
    let mut out = Vec::new();
    for (step, event) in events(path) {
        let summary = event.iter().find(|(number, _)| *number == 5).map(|(_, field)| fields(bytes_of(field)));
        for (_, value) in summary.unwrap_or_default() {
            if let [(1, tag), value] = fields(bytes_of(&value)).as_slice() {
                out.push((step, String::from_utf8(bytes_of(tag).to_vec()).unwrap(), value.clone()));
            }
        }
    }
    out
}

/// Every scalar of a file: (step, tag, bits of the value), in order.
pub fn scalars(path: &Path) -> Vec<(u64, String, u32)> {
    let scalar = |(step, tag, value)| match value {
        (2, Field::Number(bits)) => Some((step, tag, bits as u32)),
        _ => None,
    };
    values(path).into_iter().filter_map(scalar).collect()
}

/// Every picture of a file: (step, bytes of its message), in order.
pub fn pictures(path: &Path) -> Vec<(u64, Vec<u8>)> {
    let picture = |(step, _, value)| match value {
        (4, Field::Bytes(bytes)) => Some((step, bytes)),
        _ => None,
    };
    values(path).into_iter().filter_map(picture).collect()
}
