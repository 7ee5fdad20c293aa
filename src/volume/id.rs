//! Names that come from outside, parsed once: the types of this file are known to be harmless.

use std::borrow::Borrow;
use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use thiserror::Error;

/// Longest [`VolumeId`], in bytes: a DNS label, so that the id is also a legal Kubernetes object name and label value.
pub(crate) const VOLUME_ID_MAX: usize = 63;

/// Only [`VolumeId::for_name`] makes ids with this prefix: no literal name can pass for a hashed one.
const HASHED: &str = "hash-";

/// Ids with this prefix belong to volumes that `hostdir selftest` makes and deletes.
pub(crate) const SELF_TEST: &str = "selftest-";

/// A text that is not a [`VolumeId`], [`PoolName`] or [`NodeName`], and why.
#[derive(Debug, Error)]
#[error("{what} {text:?} {why}")]
pub(crate) struct InvalidName {
    what: &'static str,
    /// Truncated: a refused text may be megabytes of anything.
    text: String,
    why: &'static str,
}

impl InvalidName {
    fn new(what: &'static str, text: &str, why: &'static str) -> Self {
        let mut shown: String = text.chars().take(80).collect();
        if shown.len() < text.len() {
            shown.push('…');
        }
        Self { what, text: shown, why }
    }
}

/// The only name of a volume that becomes a path component.
///
/// 1 to 63 bytes of `a-z`, `0-9` and `-`, beginning and ending with a letter or digit. No dot, no slash, no upper case: no
/// id can leave its directory, and no two ids are the same on a case-insensitive filesystem.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct VolumeId(String);

impl VolumeId {
    /// Accepts every id that hostdir can have given out.
    ///
    /// # Errors
    /// The text breaks the grammar above.
    pub(crate) fn parse(text: &str) -> Result<Self, InvalidName> {
        label(text)
            .map(|()| Self(text.to_owned()))
            .map_err(|why| InvalidName::new("volume id", text, why))
    }

    /// The id of the volume that CreateVolume calls `name`: the name itself if it is a valid id (as external-provisioner's
    /// `pvc-<uid>` is), else a hash of it. CSI allows any Unicode in a name.
    pub(crate) fn for_name(name: &str) -> Self {
        match Self::parse(name) {
            Ok(id) if !name.starts_with(HASHED) => id,
            Ok(_) | Err(_) => Self(hashed(name)),
        }
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the volume is one that `hostdir selftest` makes.
    pub(crate) fn is_of_self_test(&self) -> bool {
        self.0.starts_with(SELF_TEST)
    }
}

impl TryFrom<String> for VolumeId {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        Self::parse(&text)
    }
}

impl From<VolumeId> for String {
    fn from(id: VolumeId) -> Self {
        id.0
    }
}

impl Borrow<str> for VolumeId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of a pool: a DNS label, chosen by the administrator, used in StorageClasses.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct PoolName(String);

impl PoolName {
    /// The pool of a StorageClass that names none.
    pub(crate) const DEFAULT: &str = "default";

    /// # Errors
    /// The text is not a DNS label of at most 63 bytes.
    pub(crate) fn parse(text: &str) -> Result<Self, InvalidName> {
        label(text)
            .map(|()| Self(text.to_owned()))
            .map_err(|why| InvalidName::new("pool name", text, why))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for PoolName {
    fn default() -> Self {
        Self(Self::DEFAULT.to_owned())
    }
}

impl TryFrom<String> for PoolName {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        Self::parse(&text)
    }
}

impl From<PoolName> for String {
    fn from(name: PoolName) -> Self {
        name.0
    }
}

impl fmt::Display for PoolName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The Kubernetes name of a node, and what represents it in a topology.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct NodeName(String);

impl NodeName {
    /// Longest Kubernetes node name, in bytes (a DNS subdomain).
    const MAX: usize = 253;

    /// # Errors
    /// The text is not a DNS subdomain.
    pub(crate) fn parse(text: &str) -> Result<Self, InvalidName> {
        let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        if text.len() > Self::MAX {
            Err(InvalidName::new("node name", text, "is longer than 253 bytes"))
        } else if !text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
            || !ends(text.chars().next())
            || !ends(text.chars().last())
        {
            let why = "must be letters, digits, '-', '_' and '.', with a letter or digit at both ends";
            Err(InvalidName::new("node name", text, why))
        } else {
            Ok(Self(text.to_owned()))
        }
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// The value of this node's topology segment. It becomes a label of the Node, so a hash replaces names longer than a
    /// label value may be (63 bytes).
    pub(crate) fn segment(&self) -> String {
        if self.0.len() <= VOLUME_ID_MAX {
            self.0.clone()
        } else {
            hashed(&self.0)
        }
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Checks that `text` is an RFC 1123 label.
fn label(text: &str) -> Result<(), &'static str> {
    let bytes = text.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
        return Err("is empty");
    };
    if bytes.len() > VOLUME_ID_MAX {
        return Err("is longer than 63 bytes");
    }
    let plain = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    if !bytes.iter().all(|b| plain(b) || *b == b'-') || !plain(first) || !plain(last) {
        return Err("must be lower-case letters, digits and '-', with a letter or digit at both ends");
    }
    Ok(())
}

/// Half of a SHA-256 in hexadecimal. A collision is next to impossible, and would be noticed: the record holds the full
/// name.
fn hashed(text: &str) -> String {
    let digest: [u8; 32] = Sha256::digest(text.as_bytes()).into();
    let half = digest
        .iter()
        .take(16)
        .fold(0_u128, |number, byte| number << 8 | u128::from(*byte));
    format!("{HASHED}{half:032x}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn provisioner_names_stay_as_they_are() {
        let name = "pvc-7f3c9a52-6f0e-4f7b-9a55-0d3f0a1f2b3c";
        assert_eq!(VolumeId::for_name(name).as_str(), name);
    }

    #[test]
    fn hostile_ids_are_refused() {
        let long = "a".repeat(64);
        for text in [
            "",
            ".",
            "..",
            "../../etc",
            "/etc",
            "a/b",
            ".hostdir",
            "a\0b",
            "a\nb",
            "A",
            "ä",
            "-a",
            "a-",
            "a.b",
            &long,
        ] {
            assert!(VolumeId::parse(text).is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn a_literal_name_cannot_pass_for_a_hashed_one() {
        let hashed = VolumeId::for_name("Some Name");
        assert_ne!(VolumeId::for_name(hashed.as_str()), hashed);
    }

    #[test]
    fn refusals_show_a_bounded_piece_of_the_text() {
        let error = VolumeId::parse(&"x".repeat(1 << 20)).unwrap_err().to_string();
        assert!(error.len() < 300, "{} bytes", error.len());
    }

    #[test]
    fn long_node_names_fit_a_label() {
        let name = NodeName::parse(&format!("{}.example.com", "n".repeat(80))).unwrap();
        assert!(name.segment().len() <= 63);
        assert_eq!(NodeName::parse("node-a").unwrap().segment(), "node-a");
    }

    proptest! {
        #[test]
        fn every_name_has_an_id_that_is_one_harmless_path_component(name in any::<String>()) {
            let id = VolumeId::for_name(&name);
            prop_assert!(VolumeId::parse(id.as_str()).is_ok());
            prop_assert_eq!(VolumeId::for_name(&name), id);
        }

        #[test]
        fn whatever_parses_is_harmless(text in ".{0,80}") {
            if let Ok(id) = VolumeId::parse(&text) {
                prop_assert!(!id.as_str().contains(['/', '.', '\0', '\n']));
                prop_assert!(!id.as_str().is_empty() && id.as_str().len() <= VOLUME_ID_MAX);
            }
        }

        #[test]
        fn different_names_have_different_ids(a in ".{1,40}", b in ".{1,40}") {
            prop_assume!(a != b);
            prop_assert_ne!(VolumeId::for_name(&a), VolumeId::for_name(&b));
        }
    }
}
