//! What runs inside a machine of our own, on each filesystem; `main` starts the machine.

use std::path::Path;
use std::process::Command;

use hostdir_lab::disk::enable_btrfs_quotas;
use hostdir_lab::{Scratch, needs, uml};

use crate::place::Place;
use crate::{policy, scenarios};

/// Runs one on the disk of the machine.
fn on_the_disk(quotas: bool, scenario: fn(&Place)) {
    let scratch = Scratch::new();
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
macro_rules! in_guest {
    ($need:ident, $quotas:expr, $module:ident: $($scenario:ident),* $(,)?) => {
        $(
            #[needs($need)]
            fn $scenario() {
                on_the_disk($quotas, $module::$scenario);
            }
        )*
    };
}

in_guest![Guest, true, scenarios:
    a_volume_ends_at_its_size,
    a_volume_grows_while_it_is_written_to,
    a_deleted_volume_leaves_nothing_behind,
    many_callers_get_volumes_of_their_own,
    inodes_are_limited_where_they_can_be,
    a_full_pool_answers_and_deletes,
    nothing_leaves_a_volume_by_name,
    a_restart_puts_limits_right,
];

in_guest![Guest, true, policy:
    quotas_that_are_off_lift_limits_and_on_again_set_them,
    quotas_that_are_switched_off_are_missed,
    another_filesystem_over_the_pool_is_refused,
];

in_guest![GuestWithProjects, true, policy:
    records_that_are_edited_are_told_from_what_is_on_the_disk,
    directories_that_leave_their_project_are_missed,
    in_a_user_namespace_no_file_leaves_its_project,
    ids_in_use_are_given_to_nobody,
];

in_guest![Guest, false, policy:
    without_quotas_required_refuses_and_auto_says_so,
];
