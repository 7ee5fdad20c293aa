//! What runs inside a machine of our own, on each filesystem. Outside these tests are ignored; [`super`] starts the machine.

use std::path::Path;
use std::process::Command;

use super::place::Place;
use super::scenarios;
use super::wishes;
use crate::support::Scratch;
use crate::support::disk::enable_btrfs_quotas;
use crate::support::uml;

/// Runs one on the disk of the machine.
fn on_the_disk(test: &str, quotas: bool, scenario: fn(&Place)) {
    let scratch = Scratch::new(test).expect("root, and CI is set");
    let (filesystem, disk) = (uml::filesystem(), scratch.mkdir("disk"));
    filesystem.mount(Path::new(uml::DEVICE), &disk, quotas);
    if !filesystem.has_projects() {
        // They stay as they are from one test to the next.
        let _ = Command::new("btrfs").args(["quota", "disable"]).arg(&disk).output();
        if quotas {
            enable_btrfs_quotas(&disk, false);
        }
    }
    scenario(&Place::new(scratch, disk, filesystem, false));
}

/// Makes a test of each scenario.
macro_rules! inside {
    ($quotas:expr, $module:ident: $($scenario:ident),* $(,)?) => {
        $(
            #[test]
            #[ignore = "runs inside a machine of the test's"]
            fn $scenario() {
                on_the_disk(stringify!($scenario), $quotas, $module::$scenario);
            }
        )*
    };
}

inside![true, scenarios:
    a_volume_ends_at_its_size,
    a_volume_grows_while_it_is_written_to,
    a_deleted_volume_leaves_nothing_behind,
    many_callers_get_volumes_of_their_own,
    inodes_are_limited_where_they_can_be,
    a_full_pool_answers_and_deletes,
    nothing_leaves_a_volume_by_name,
    a_restart_puts_limits_right,
];

inside![true, wishes:
    quotas_that_are_off_lift_limits_and_on_again_set_them,
    records_that_are_edited_are_told_from_what_is_on_the_disk,
    directories_that_leave_their_project_are_missed,
    quotas_that_are_switched_off_are_missed,
    another_filesystem_over_the_pool_is_refused,
    in_a_user_namespace_no_file_leaves_its_project,
    ids_in_use_are_given_to_nobody,
];

inside![false, wishes:
    without_quotas_required_refuses_and_auto_says_so,
];
