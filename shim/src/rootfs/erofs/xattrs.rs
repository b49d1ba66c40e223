//! Extended attributes as they stand beside an inode: a header of twelve bytes, then entries, each aligned to four bytes.

/// Collects a file's extended attributes.
#[derive(Debug, Default)]
pub struct Xattrs(Vec<u8>);

impl Xattrs {
    /// Adds an attribute. False if its name belongs to none of the namespaces that the format has (`user.`, `trusted.`,
    /// `security.` and POSIX access control lists), or if name, value or all attributes together are too long for it.
    #[must_use]
    pub fn add(&mut self, name: &[u8], value: &[u8]) -> bool {
        const NAMESPACES: [(&[u8], u8); 5] = [
            (b"user.", 1),
            (b"system.posix_acl_access", 2),
            (b"system.posix_acl_default", 3),
            (b"trusted.", 4),
            (b"security.", 6),
        ];
        let found = NAMESPACES
            .iter()
            .find_map(|&(prefix, index)| Some((name.strip_prefix(prefix)?, index)));
        let Some((name, index)) = found else {
            return false;
        };
        let (Ok(name_length), Ok(value_length)) =
            (u8::try_from(name.len()), u16::try_from(value.len()))
        else {
            return false;
        };
        if self.0.is_empty() {
            self.0.resize(12, 0);
        }
        self.0.extend([name_length, index]);
        self.0.extend(value_length.to_le_bytes());
        self.0.extend(name);
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        encoded_count(&self.0) <= usize::from(u16::MAX)
    }

    /// The encoded attributes.
    pub fn finish(self) -> Box<[u8]> {
        self.0.into()
    }
}

/// The length of encoded attributes as an inode tells it.
pub(super) fn encoded_count(xattrs: &[u8]) -> usize {
    match xattrs.len() {
        0 => 0,
        length => (length - 12) / 4 + 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_that_the_format_cannot_hold_are_refused() {
        let mut xattrs = Xattrs::default();
        assert!(xattrs.add(b"trusted.overlay.opaque", b"y"));
        assert!(!xattrs.add(b"system.nfs4_acl", b""));
        assert!(!xattrs.add(b"user.long", &[0; 65_536]));
        let mut xattrs = Xattrs::default();
        let fits = (0..4)
            .take_while(|_| xattrs.add(b"user.x", &[0; 65_535]))
            .count();
        assert_eq!(fits, 3);
    }
}
