//! Which project each volume is in, according to records and directories: pure functions, so that tests can try every case.
//!
//! A volume is in a project if its record and its directory agree on it. The record alone is not enough: the kernel counts
//! files by the project that they have. Neither is the directory: its owner can change its project, even to that of a
//! neighbour.

use crate::linux::sys::quota::Tag;
use crate::volume::id::VolumeId;
use crate::volume::quota::ProjectRange;
use crate::volume::record::Record;

/// What the record and the directory of a volume say.
pub(super) struct Tagged {
    pub(super) id: VolumeId,
    /// The project that the record names.
    pub(super) told: Option<u32>,
    /// Whether a pod has used the volume, if its record can be read.
    ready: Option<bool>,
    /// The project that the directory has, if there is a directory.
    pub(super) tag: Option<Tag>,
}

impl Tagged {
    pub(super) fn new(id: &VolumeId, record: Option<&Record>, tag: Option<Tag>) -> Self {
        Self {
            id: id.clone(),
            told: record.and_then(|record| record.project).filter(|project| *project != 0),
            ready: record.map(|record| record.ready),
            tag,
        }
    }

    /// The project that must not be given to another volume: the one that the record names or, if the record cannot be read,
    /// the one that the directory has.
    pub(super) fn project(&self) -> Option<u32> {
        let of_files = self.tag.filter(|_| self.ready.is_none()).map(|tag| tag.project);
        self.told.or(of_files).filter(|project| *project != 0)
    }
}

/// Which project a volume is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Membership {
    /// It is the only volume of this project.
    Of(u32),
    /// It has no project of its own, and why.
    Unenforced(String),
    /// No pod has used it, or it has no directory.
    Unused,
}

/// Which project a volume is in. `other` returns another volume that has the same project, if there is one.
pub(super) fn membership(
    volume: &Tagged,
    other: impl Fn(u32, &VolumeId) -> Option<VolumeId>,
    range: ProjectRange,
) -> Membership {
    const NEW: &str = "make a new volume and copy its data there";
    let Some(Tag { project, inherited }) = volume.tag.filter(|_| volume.ready == Some(true)) else {
        return Membership::Unused;
    };
    let id = &volume.id;
    match volume.told {
        Some(told) => match other(told, id) {
            Some(other) => Membership::Unenforced(format!(
                "its record and that of volume {other} both name project {told}; correct `project` in the one that is \
                 wrong, and restart hostdir on this node"
            )),
            None if project == told && inherited => Membership::Of(told),
            None => Membership::Unenforced(format!(
                "its directory is not in project {told} any more, which its record names (was it copied here?); put it \
                 back with `chattr -R -f -p {told} DIR; find DIR -type d -exec chattr +P {{}} +`, where DIR is its data \
                 directory, and restart its pods"
            )),
        },
        None if inherited && range.contains(project) && other(project, id).is_none() => {
            Membership::Unenforced(format!(
                "its record names no project, and its directory is in project {project}; if it is the only one there, write \
             \"project\": {project} into its volume.json, and restart hostdir on this node"
            ))
        }
        None => Membership::Unenforced(format!("it was made when this pool had no quotas; {NEW}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which project each volume of a pool is in.
    fn sort(volumes: &[Tagged], range: ProjectRange) -> Vec<Membership> {
        let other = |project: u32, id: &VolumeId| {
            let owner = volumes
                .iter()
                .find(|volume| volume.project() == Some(project) && volume.id != *id);
            owner.map(|volume| volume.id.clone())
        };
        volumes.iter().map(|volume| membership(volume, other, range)).collect()
    }

    const RANGE: ProjectRange = ProjectRange { first: 100, last: 199 };

    fn volume(id: &str, told: Option<u32>, tag: Option<(u32, bool)>) -> Tagged {
        Tagged {
            id: VolumeId::parse(id).unwrap(),
            told: told.filter(|told| *told != 0),
            ready: Some(true),
            tag: tag.map(|(project, inherited)| Tag { project, inherited }),
        }
    }

    fn alone(told: Option<u32>, tag: Option<(u32, bool)>) -> Membership {
        sort(&[volume("a", told, tag)], RANGE).remove(0)
    }

    #[test]
    fn record_and_directory_have_to_agree() {
        assert_eq!(alone(Some(100), Some((100, true))), Membership::Of(100));
        // Assigned when the range was another one.
        assert_eq!(alone(Some(5), Some((5, true))), Membership::Of(5));
        // Edited records, copied volumes, the project of a directory above the pool, a project that files do not inherit.
        for (told, tag) in [
            (Some(101), (100, true)),
            (Some(0), (100, true)),
            (None, (100, true)),
            (None, (0, false)),
            (None, (7, true)),
            (Some(100), (0, false)),
            (Some(100), (100, false)),
            (Some(0), (0, true)),
        ] {
            assert!(
                matches!(alone(told, Some(tag)), Membership::Unenforced(_)),
                "{told:?} {tag:?}"
            );
        }
    }

    #[test]
    fn a_tenant_that_enters_the_project_of_a_neighbour_does_that_no_harm() {
        let both = [
            volume("victim", Some(100), Some((100, true))),
            volume("attacker", Some(101), Some((100, true))),
        ];
        let memberships = sort(&both, RANGE);
        assert_eq!(memberships[0], Membership::Of(100));
        assert!(matches!(&memberships[1], Membership::Unenforced(why) if why.contains("-p 101")));
    }

    #[test]
    fn a_project_has_one_volume() {
        let both = [
            volume("a", Some(100), Some((100, true))),
            volume("b", Some(100), Some((100, true))),
        ];
        for membership in sort(&both, RANGE) {
            assert!(matches!(membership, Membership::Unenforced(_)), "{membership:?}");
        }
    }

    #[test]
    fn a_way_out_is_only_named_where_it_is_one() {
        let why = |volumes: &[Tagged]| match sort(volumes, RANGE).remove(0) {
            Membership::Unenforced(why) => why,
            other => panic!("{other:?}"),
        };
        assert!(why(&[volume("a", Some(100), Some((0, false)))]).contains("chattr -R -f -p 100 DIR"));
        assert!(why(&[volume("a", None, Some((100, true)))]).contains("\"project\": 100"));
        let taken = [
            volume("a", None, Some((100, true))),
            volume("b", Some(100), Some((100, true))),
        ];
        assert!(why(&taken).contains("copy"), "{}", why(&taken));
    }

    #[test]
    fn what_no_pod_has_used_is_in_no_project() {
        assert_eq!(alone(Some(100), None), Membership::Unused);
        let claimed = Tagged {
            ready: Some(false),
            ..volume("a", None, Some((100, true)))
        };
        assert_eq!(claimed.project(), None);
        assert_eq!(sort(&[claimed], RANGE), [Membership::Unused]);
    }

    #[test]
    fn no_project_is_given_twice_that_a_record_names() {
        assert_eq!(volume("a", Some(100), None).project(), Some(100));
        let broken = Tagged {
            ready: None,
            ..volume("b", None, Some((101, true)))
        };
        assert_eq!(broken.project(), Some(101));
        assert_eq!(volume("c", Some(0), Some((102, true))).project(), None);
    }
}
