//! Which project each volume is in, by what records and directories say: pure, so that every case can be tried.
//!
//! The directory is believed before the record. Its files have its project, and the kernel counts by that; a record may have
//! been edited, restored or rewritten by an older hostdir.

use std::collections::HashMap;

use crate::linux::sys::quota::Tag;
use crate::volume::id::VolumeId;
use crate::volume::quota::Projects;
use crate::volume::record::{Phase, Record};

/// What record and directory of a volume say.
pub(super) struct Tagged {
    pub(super) id: VolumeId,
    /// The project that the record names.
    pub(super) told: Option<u32>,
    /// How far it has come, if its record can be read.
    phase: Option<Phase>,
    /// The project that the directory has, if there is a directory.
    pub(super) tag: Option<Tag>,
}

impl Tagged {
    pub(super) fn new(id: &VolumeId, record: Option<&Record>, tag: Option<Tag>) -> Self {
        Self {
            id: id.clone(),
            told: record.and_then(|record| record.project),
            phase: record.map(|record| record.phase),
            tag,
        }
    }

    /// The projects that must not be given to another volume. What the directory of a claim has that no pod has used is left
    /// of an attempt to use it, which takes it up or takes another.
    pub(super) fn projects(&self) -> impl Iterator<Item = u32> + use<> {
        let of_files = self.tag.filter(|_| self.phase != Some(Phase::Claimed));
        let projects = [self.told, of_files.map(|tag| tag.project)];
        projects.into_iter().flatten().filter(|project| *project != 0)
    }
}

/// Where a volume stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// It is this project's only volume.
    In(u32),
    /// It is in none of its own, and why.
    Loose(String),
    /// No pod has used it, or there is nothing of it.
    Unused,
}

/// Where each of the volumes of a pool stands.
pub(super) fn sort(volumes: &[Tagged], range: Projects) -> Vec<Standing> {
    let mut owners: HashMap<u32, Vec<&VolumeId>> = HashMap::new();
    for Tagged { id, tag, .. } in volumes {
        if let Some(tag) = tag {
            owners.entry(tag.project).or_default().push(id);
        }
    }
    let stand = |volume: &Tagged| match volume.tag {
        Some(tag) if volume.phase == Some(Phase::Ready) => standing(volume, tag, &owners, range),
        Some(_) | None => Standing::Unused,
    };
    volumes.iter().map(stand).collect()
}

fn standing(volume: &Tagged, tag: Tag, owners: &HashMap<u32, Vec<&VolumeId>>, range: Projects) -> Standing {
    const NEW: &str = "make a new volume and copy its data there";
    let others = |project: u32| owners.get(&project).into_iter().flatten().find(|id| ***id != volume.id);
    let Tag { project, inherited } = tag;
    let named = volume.told == Some(project);
    let own = project != 0 && inherited && (named || range.contains(project));
    if own {
        return match others(project) {
            None => Standing::In(project),
            Some(other) => Standing::Loose(format!(
                "its directory and that of volume {other} are both in project {project}; {NEW}"
            )),
        };
    }
    Standing::Loose(match volume.told {
        None => format!("it was made when this pool had no quotas; {NEW}"),
        Some(told) if range.contains(told) && others(told).is_none() => format!(
            "its files have lost project {told}, which its record names (were they copied here?); give it back with \
             `chattr -R -f -p {told} DIR; find DIR -type d -exec chattr +P {{}} +`, where DIR is its data directory, and restart \
             hostdir on this node"
        ),
        Some(told) => format!(
            "its record names project {told}, which is not its own, and its directory has project {project}; {NEW}"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: Projects = Projects { first: 100, last: 199 };

    fn volume(id: &str, told: Option<u32>, tag: Option<(u32, bool)>) -> Tagged {
        Tagged {
            id: VolumeId::parse(id).unwrap(),
            told,
            phase: Some(Phase::Ready),
            tag: tag.map(|(project, inherited)| Tag { project, inherited }),
        }
    }

    fn alone(told: Option<u32>, tag: Option<(u32, bool)>) -> Standing {
        sort(&[volume("a", told, tag)], RANGE).remove(0)
    }

    #[test]
    fn the_directory_is_believed_before_the_record() {
        assert_eq!(alone(Some(100), Some((100, true))), Standing::In(100));
        // Edited, restored from a time before, or rewritten by an older hostdir.
        for told in [Some(101), Some(0), Some(5), None] {
            assert_eq!(alone(told, Some((100, true))), Standing::In(100), "{told:?}");
        }
        // Given when the range was another one.
        assert_eq!(alone(Some(5), Some((5, true))), Standing::In(5));
    }

    #[test]
    fn what_is_not_proven_its_own_is_no_project_of_a_volume() {
        // No project; the project of a directory that the pool lies in; a project that files do not get.
        for (told, tag) in [
            (None, (0, false)),
            (None, (7, true)),
            (Some(100), (0, false)),
            (Some(100), (100, false)),
            (Some(0), (0, true)),
            (Some(0), (0, false)),
        ] {
            assert!(matches!(alone(told, Some(tag)), Standing::Loose(_)), "{told:?} {tag:?}");
        }
    }

    #[test]
    fn a_way_out_is_only_named_where_it_is_one() {
        let Standing::Loose(why) = alone(Some(100), Some((0, false))) else {
            panic!()
        };
        assert!(why.contains("chattr -R -f -p 100 DIR"), "{why}");
        // The project is another volume's by now.
        let taken = [
            volume("a", Some(100), Some((0, false))),
            volume("b", Some(100), Some((100, true))),
        ];
        let standings = sort(&taken, RANGE);
        assert!(
            matches!(&standings[0], Standing::Loose(why) if !why.contains("chattr")),
            "{standings:?}"
        );
        assert_eq!(standings[1], Standing::In(100));
    }

    #[test]
    fn a_project_has_one_volume() {
        let both = [
            volume("a", Some(100), Some((100, true))),
            volume("b", None, Some((100, true))),
        ];
        for standing in sort(&both, RANGE) {
            assert!(matches!(standing, Standing::Loose(_)), "{standing:?}");
        }
    }

    #[test]
    fn what_no_pod_has_used_stands_nowhere() {
        assert_eq!(alone(Some(100), None), Standing::Unused);
        let claimed = Tagged {
            phase: Some(Phase::Claimed),
            ..volume("a", None, Some((100, true)))
        };
        assert_eq!(claimed.projects().count(), 0);
        assert_eq!(sort(&[claimed], RANGE), [Standing::Unused]);
    }

    #[test]
    fn no_project_is_given_twice_that_a_record_or_a_directory_names() {
        let away = volume("a", Some(100), None);
        assert_eq!(away.projects().collect::<Vec<_>>(), [100]);
        let broken = Tagged {
            phase: None,
            ..volume("b", None, Some((101, true)))
        };
        assert_eq!(broken.projects().collect::<Vec<_>>(), [101]);
        let both = volume("c", Some(0), Some((102, true)));
        assert_eq!(both.projects().collect::<Vec<_>>(), [102]);
    }
}
