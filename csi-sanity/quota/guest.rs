//! The tests that run inside a UML machine, on each filesystem; `main` starts the machine.

use std::path::Path;
use std::process::Command;

use hostdir_lab::disk::enable_btrfs_quotas;
use hostdir_lab::{Scratch, needs, uml};

use crate::place::Place;
use crate::{policy, scenarios};

/// Runs a scenario on the machine's disk, with quotas on or off.
fn on_the_disk(quotas: bool, scenario: fn(&Place)) {
    let scratch = Scratch::new();
    let (filesystem, disk) = (uml::filesystem(), scratch.mkdir("disk"));
    filesystem.mount(Path::new(uml::DEVICE), &disk, quotas);
    if !filesystem.has_projects() {
        // btrfs keeps quotas on or off from one test to the next.
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
    a_volume_cannot_exceed_its_size,
    a_volume_grows_while_it_is_written_to,
    a_deleted_volume_leaves_nothing_behind,
    many_callers_get_volumes_of_their_own,
    inodes_are_limited_or_the_setting_is_refused,
    a_full_pool_answers_clearly_and_deletes_still_work,
    links_and_renames_between_volumes_are_refused,
    a_restart_restores_limits,
];

in_guest![Guest, true, policy:
    quota_off_lifts_limits_and_quota_auto_sets_them_again,
    quotas_switched_off_on_the_filesystem_are_noticed,
    a_filesystem_mounted_over_the_pool_is_noticed,
];

in_guest![GuestWithProjects, true, policy:
    edited_records_that_contradict_the_disk_are_refused,
    a_directory_that_left_its_project_is_refused,
    a_file_cannot_leave_its_project_from_a_user_namespace,
    project_ids_in_use_are_not_given_out,
    a_clock_that_jumps_disturbs_no_call,
];

in_guest![Guest, false, policy:
    without_quotas_required_refuses_and_auto_warns,
];
