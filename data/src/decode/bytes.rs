//! Reading big-endian fields and nested boxes from untrusted bytes: everything is checked, nothing allocates.

/// A cursor over bytes. Every read that would pass the end gives `None`.
#[derive(Clone, Copy)]
pub(super) struct Bytes<'a>(pub &'a [u8]);

impl<'a> Bytes<'a> {
    pub(super) fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(count)?;
        self.0 = tail;
        Some(head)
    }

    pub(super) fn skip(&mut self, count: usize) -> Option<()> {
        self.take(count).map(|_| ())
    }

    pub(super) fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.take(2)?.try_into().ok().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.take(4)?.try_into().ok().map(u32::from_be_bytes)
    }

    pub(super) fn i32(&mut self) -> Option<i32> {
        self.u32().map(u32::cast_signed)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.take(8)?.try_into().ok().map(u64::from_be_bytes)
    }

    pub(super) fn four_letters(&mut self) -> Option<[u8; 4]> {
        self.take(4)?.try_into().ok()
    }
}

/// The boxes inside a box of an MP4 file (ISO/IEC 14496-12 §4.2): name and contents, up to the first that does not fit.
pub(super) fn boxes<'a>(data: &'a [u8]) -> impl Iterator<Item = ([u8; 4], Bytes<'a>)> + use<'a> {
    let mut rest = Bytes(data);
    std::iter::from_fn(move || {
        let whole = rest.0.len() as u64;
        let short = rest.u32()?;
        let name = rest.four_letters()?;
        let (size, header) = match short {
            0 => (whole, 8),
            1 => (rest.u64()?, 16),
            size => (u64::from(size), 8),
        };
        let contents = rest.take(usize::try_from(size.checked_sub(header)?).ok()?)?;
        Some((name, Bytes(contents)))
    })
}

/// The first box called `name`.
pub(super) fn child<'a>(data: Bytes<'a>, name: &[u8; 4]) -> Option<Bytes<'a>> {
    boxes(data.0).find(|(found, _)| found == name).map(|(_, contents)| contents)
}

/// The first box along a path of names.
pub(super) fn descend<'a>(data: Bytes<'a>, path: &[&[u8; 4]]) -> Option<Bytes<'a>> {
    path.iter().try_fold(data, |inside, name| child(inside, name))
}
