//! Which identities outside a user namespace, or on a disk, stand for which inside.

use std::fs;

use oci_spec::runtime::LinuxIdMapping;

use crate::error::{Context, Error};

/// The identities of a user namespace: each entry is the first identity inside, the first outside, and their number.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mappings {
    users: Vec<(u32, u32, u32)>,
    groups: Vec<(u32, u32, u32)>,
}

impl Mappings {
    /// Reads the lists of a specification.
    pub fn new(users: &Option<Vec<LinuxIdMapping>>, groups: &Option<Vec<LinuxIdMapping>>) -> Self {
        let read = |mappings: &Option<Vec<LinuxIdMapping>>| {
            let mappings = mappings.iter().flatten();
            mappings
                .map(|m| (m.container_id(), m.host_id(), m.size()))
                .collect()
        };
        Self {
            users: read(users),
            groups: read(groups),
        }
    }

    /// Takes the options `uidmap=` and `gidmap=` (`INSIDE:OUTSIDE:NUMBER`, several with commas between them) out of a list of options;
    /// none if there are none. The error is the option that is not understood.
    pub fn from_options(options: &mut Vec<String>) -> Result<Option<Self>, String> {
        let mut mappings = Self::default();
        let mut error = None;
        options.retain(|option| {
            let (list, text) = match option.split_once('=') {
                Some(("uidmap", text)) => (&mut mappings.users, text),
                Some(("gidmap", text)) => (&mut mappings.groups, text),
                _ => return true,
            };
            match text.split(',').map(parse).collect::<Option<Vec<_>>>() {
                Some(mut read) => list.append(&mut read),
                None => error = Some(option.clone()),
            }
            false
        });
        match error {
            Some(option) => Err(option),
            None if mappings == Self::default() => Ok(None),
            None => Ok(Some(mappings)),
        }
    }

    /// Whether there are none, of users and of groups.
    pub fn are_empty(&self) -> (bool, bool) {
        (self.users.is_empty(), self.groups.is_empty())
    }

    /// The identity outside of one of the users inside.
    pub fn user(&self, uid: u32) -> u32 {
        let found = self
            .users
            .iter()
            .find(|&&(inside, _, size)| uid.wrapping_sub(inside) < size);
        match found {
            Some((inside, outside, _)) => outside.wrapping_add(uid.wrapping_sub(*inside)),
            None => uid,
        }
    }

    /// Gives them to the user namespace of a process.
    pub fn write(&self, pid: u32) -> Result<(), Error> {
        for (file, mappings) in [("uid_map", &self.users), ("gid_map", &self.groups)] {
            let lines = mappings.iter();
            let lines = lines.map(|(inside, outside, size)| format!("{inside} {outside} {size}\n"));
            let path = format!("/proc/{pid}/{file}");
            fs::write(&path, lines.collect::<String>()).context(|| format!("writing {path}"))?;
        }
        Ok(())
    }
}

fn parse(text: &str) -> Option<(u32, u32, u32)> {
    let mut numbers = text.split(':').map(|number| number.parse().ok());
    match (
        numbers.next()?,
        numbers.next()?,
        numbers.next()?,
        numbers.next(),
    ) {
        (Some(inside), Some(outside), Some(size), None) => Some((inside, outside, size)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_become_mappings() {
        let mut options = ["index=off", "uidmap=0:1000:10,20:5:1", "gidmap=0:7:1"]
            .map(String::from)
            .to_vec();
        let mappings = Mappings::from_options(&mut options).unwrap().unwrap();
        assert_eq!(options, ["index=off"]);
        assert_eq!(
            [0, 9, 20, 10].map(|uid| mappings.user(uid)),
            [1000, 1009, 5, 10]
        );
        assert_eq!(mappings.groups, [(0, 7, 1)]);
        assert_eq!(Mappings::from_options(&mut options), Ok(None));
        for bad in [
            "uidmap=",
            "uidmap=0:1",
            "gidmap=0:1:2:3",
            "gidmap=x:1:2",
            "uidmap=0:0:-1",
        ] {
            let bad = bad.to_owned();
            assert_eq!(Mappings::from_options(&mut vec![bad.clone()]), Err(bad));
        }
    }
}
