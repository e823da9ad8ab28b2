//! The ancestor's promises: each test case of `gitlab_runner_api` has a counterpart among ours.
//!
//! chrisburr/gitlab-runner-api was the first runner to hand jobs of GitLab to a batch system this way,
//! and its 91 test cases say what its users could rely on. The table names, for each, the test of ours
//! that keeps the promise, or keeps the better one where the ancestor had a defect: its `repr` showed
//! tokens and ours must not, its offsets counted characters and ours count bytes, what it refused with
//! `NotImplementedError` works. A promise that moves to another test moves here as well.

use std::collections::BTreeSet;
use std::path::Path;

/// Number, file and case over there; file and test over here.
type Promise = (usize, &'static str, &'static str, &'static str, &'static str);

#[rustfmt::skip]
const PROMISES: &[Promise] = &[
    (1, "fake_api/jobs/test_download_artifacts", "test_valid_body", "src/coordinator/tests/artifacts.rs", "a_later_job_gets_files_and_variables_of_an_earlier_one"),
    (2, "fake_api/jobs/test_download_artifacts", "test_auth_error", "src/coordinator/tests/artifacts.rs", "what_makes_no_sense_is_refused_with_words"),
    (3, "fake_api/jobs/test_request", "test_no_token", "src/coordinator/tests/strict.rs", "a_request_without_a_token_is_400"),
    (4, "fake_api/jobs/test_request", "test_invalid_token", "src/coordinator/tests/requesting.rs", "an_unknown_token_is_forbidden"),
    (5, "fake_api/jobs/test_request", "test_none_available", "src/coordinator/tests/requesting.rs", "rails_says_204_with_the_value_of_the_queue"),
    (6, "fake_api/jobs/test_request", "test_request_job", "src/coordinator/tests/queue.rs", "jobs_are_handed_out_in_order"),
    (7, "fake_api/jobs/test_request", "test_bad_info", "src/coordinator/tests/strict.rs", "a_request_with_an_info_that_is_none_costs_no_job"),
    (8, "fake_api/jobs/test_trace_patching", "test", "src/coordinator/tests/strict.rs", "a_trace_comes_in_pieces_and_each_answer_tells_the_length"),
    (9, "fake_api/jobs/test_trace_patching", "test_auth_error", "src/coordinator/tests/strict.rs", "a_patch_is_asked_for_its_token_before_its_range"),
    (10, "fake_api/jobs/test_trace_patching", "test_range_error", "src/coordinator/tests/strict.rs", "a_patch_says_where_it_belongs_and_a_wrong_place_is_told_the_right_one"),
    (11, "fake_api/jobs/test_trace_patching", "test_completed", "src/coordinator/tests/updating.rs", "nothing_is_taken_after_the_end"),
    (12, "fake_api/jobs/test_update", "test_update_log_only", "src/coordinator/tests/strict.rs", "an_update_that_only_says_running_changes_nothing_else"),
    (13, "fake_api/jobs/test_update", "test_set_success", "src/coordinator/tests/strict.rs", "a_reason_beside_success_is_not_kept"),
    (14, "fake_api/jobs/test_update", "test_set_failed", "src/coordinator/tests/updating.rs", "a_failed_job_keeps_reason_and_exit_code"),
    (15, "fake_api/jobs/test_update", "test_invalid_state", "src/coordinator/tests/updating.rs", "a_state_that_is_none_is_400"),
    (16, "fake_api/jobs/test_update", "test_already_finished", "src/coordinator/tests/updating.rs", "nothing_is_taken_after_the_end"),
    (17, "fake_api/jobs/test_update", "test_auth_error", "src/coordinator/tests/updating.rs", "a_wrong_token_is_forbidden_without_a_status"),
    (18, "fake_api/jobs/test_update", "test_invalid_failure_reason", "src/coordinator/tests/updating.rs", "an_unknown_reason_becomes_unknown_failure"),
    (19, "fake_api/jobs/test_update", "test_invalid_info", "src/coordinator/tests/strict.rs", "an_update_with_an_info_that_is_none_changes_nothing"),
    (20, "fake_api/jobs/test_upload_artifacts", "test_valid", "src/coordinator/tests/artifacts.rs", "a_later_job_gets_files_and_variables_of_an_earlier_one"),
    (21, "fake_api/jobs/test_upload_artifacts", "test_valid_custom_expiry", "src/coordinator/tests/artifacts.rs", "what_has_expired_fails_the_later_job_or_is_not_found"),
    (22, "fake_api/jobs/test_upload_artifacts", "test_set_type_and_format", "src/job/artifacts_tests.rs", "reports_are_gzip_or_raw_and_wrong_matches_fail_as_the_author_sees"),
    (23, "fake_api/jobs/test_upload_artifacts", "test_auth_error", "src/coordinator/tests/artifacts.rs", "only_a_job_at_work_takes_artifacts"),
    (24, "fake_api/jobs/test_upload_artifacts", "test_completed", "src/coordinator/tests/artifacts.rs", "only_a_job_at_work_takes_artifacts"),
    (25, "fake_api/jobs/test_upload_artifacts", "test_already_uploaded", "src/coordinator/tests/artifacts.rs", "the_same_bytes_are_taken_twice_and_others_are_not"),
    (26, "fake_api/test_runners", "test_register_no_token", "src/coordinator/tests/strict.rs", "a_registration_with_a_value_of_the_wrong_kind_makes_no_runner"),
    (27, "fake_api/test_runners", "test_register_invalid_token", "src/coordinator/tests/runners.rs", "registration_tokens_work_where_they_are_allowed"),
    (28, "fake_api/test_runners", "test_register_valid", "src/coordinator/tests/runners.rs", "registration_tokens_work_where_they_are_allowed"),
    (29, "fake_api/test_runners", "test_invalid_data", "src/coordinator/tests/strict.rs", "a_registration_with_a_value_of_the_wrong_kind_makes_no_runner"),
    (30, "fake_api/test_runners", "test_verify_no_token", "src/coordinator/tests/runners.rs", "verify_knows_bad_tokens_orphans_and_plain_text"),
    (31, "fake_api/test_runners", "test_verify_invalid_token", "src/coordinator/tests/runners.rs", "verify_knows_bad_tokens_orphans_and_plain_text"),
    (32, "fake_api/test_runners", "test_verify_valid", "src/coordinator/tests/runners.rs", "verify_makes_a_manager_with_its_features"),
    (33, "test_env_var", "test_public", "src/job/script_tests.rs", "values_arrive_byte_for_byte"),
    (34, "test_env_var", "test_private", "src/gitlab/wire.rs", "debug_shows_no_secret"),
    (35, "test_env_var", "test_bad_key", "src/job/variables.rs", "the_last_of_a_name_wins_and_odd_ones_are_left_out"),
    (36, "test_env_var", "test_bad_is_public", "src/gitlab/tests/requesting.rs", "a_job_of_odd_types_keeps_its_name_and_proof"),
    (37, "test_fake_api", "test_repr", "src/coordinator/tests/strict.rs", "a_job_shows_its_number_and_status_and_no_token"),
    (38, "test_fake_api", "test_setting_job_failure_reason", "src/coordinator/tests/strict.rs", "a_reason_beside_success_is_not_kept"),
    (39, "test_fake_api", "test_request_init_with_artifacts", "src/coordinator/tests/artifacts.rs", "a_later_job_gets_files_and_variables_of_an_earlier_one"),
    (40, "test_job", "test_request_job", "tests/it/lifecycle.rs", "a_job_is_taken_run_and_reported"),
    (41, "test_job", "test_request_job_invalid_token", "tests/it/outage.rs", "a_runner_that_gitlab_does_not_know_turns_health_red_and_does_not_hammer"),
    (42, "test_job", "test_repr", "tests/it/cli.rs", "no_secret_is_in_anything_that_is_printed"),
    (43, "test_job", "test_serialise", "src/store/tests.rs", "a_whole_life_is_written_and_read_back"),
    (44, "test_job", "test_serialise_invalid_version", "tests/it/input.rs", "a_database_from_the_future_is_refused_and_left_alone"),
    (45, "test_job", "test_bad_job_info", "src/reconcile/tests/reporting.rs", "a_payload_that_cannot_be_read_costs_only_its_own_job"),
    (46, "test_job", "test_bad_job_info_and_fail", "tests/it/input.rs", "a_job_that_cannot_be_run_says_why_in_its_trace"),
    (47, "test_job", "test_set_success", "tests/it/lifecycle.rs", "a_job_is_taken_run_and_reported"),
    (48, "test_job", "test_set_success_bad_auth", "tests/it/outage.rs", "a_job_that_is_erased_while_it_runs_is_ended_over_there"),
    (49, "test_job", "test_set_success_twice", "src/domain/job.rs", "a_job_that_is_over_stays_over"),
    (50, "test_job", "test_set_success_with_log", "tests/it/trace.rs", "a_log_of_five_megabytes_arrives_whole"),
    (51, "test_job", "test_bad_log", "tests/it/trace.rs", "bytes_that_are_no_text_become_text"),
    (52, "test_job", "test_set_success_with_artifacts", "src/job/artifacts_tests.rs", "entries_are_due_by_how_the_script_ended"),
    (53, "test_job", "test_set_failed", "src/domain/verdict.rs", "every_cause_has_its_row"),
    (54, "test_job", "test_set_failed_bad_auth", "tests/it/input.rs", "a_403_right_after_the_201_is_the_jobs_end"),
    (55, "test_job", "test_set_failed_twice", "src/coordinator/tests/updating.rs", "repetitions_must_be_identical_and_the_first_one_counts"),
    (56, "test_job", "test_set_failed_with_log", "tests/it/trace.rs", "sections_are_balanced_whatever_becomes_of_the_job"),
    (57, "test_job", "test_set_failed_with_artifacts", "src/job/artifacts_tests.rs", "entries_are_due_by_how_the_script_ended"),
    (58, "test_job", "test_set_failed_reason", "src/coordinator/tests/strict.rs", "every_reason_the_ancestor_knew_is_kept_word_for_word"),
    (59, "test_job_properties", "test_id", "src/gitlab/tests/requesting.rs", "a_job_comes_with_its_text_as_received"),
    (60, "test_job_properties", "test_token", "src/gitlab/tests/requesting.rs", "a_job_comes_with_its_text_as_received"),
    (61, "test_job_properties", "test_set_state", "src/domain/job.rs", "exactly_the_documented_transitions_exist"),
    (62, "test_job_properties", "test_variables", "src/job/tests.rs", "the_list_has_the_official_order"),
    (63, "test_misc", "test_failure_baseclass", "src/domain/verdict.rs", "reasons_are_mapped_to_what_the_server_lists"),
    (64, "test_misc", "test_unknown_failure", "src/coordinator/tests/strict.rs", "every_reason_the_ancestor_knew_is_kept_word_for_word"),
    (65, "test_misc", "test_script_failure", "src/coordinator/tests/strict.rs", "every_reason_the_ancestor_knew_is_kept_word_for_word"),
    (66, "test_misc", "test_api_failure", "src/coordinator/tests/strict.rs", "every_reason_the_ancestor_knew_is_kept_word_for_word"),
    (67, "test_misc", "test_stuck_or_timeout_failure", "src/coordinator/tests/strict.rs", "every_reason_the_ancestor_knew_is_kept_word_for_word"),
    (68, "test_misc", "test_runner_system_failure", "src/coordinator/tests/strict.rs", "every_reason_the_ancestor_knew_is_kept_word_for_word"),
    (69, "test_misc", "test_missing_dependency_failure", "src/coordinator/tests/strict.rs", "every_reason_the_ancestor_knew_is_kept_word_for_word"),
    (70, "test_runner", "test_register_without_parameters", "src/cli/tests/register.rs", "a_plain_registration_has_gitlab_runners_defaults"),
    (71, "test_runner", "test_register_with_parameters", "src/cli/tests/register.rs", "a_registration_token_registers_with_everything_at_the_top_level"),
    (72, "test_runner", "test_equality", "src/config/tests.rs", "two_runners_of_one_name_are_refused"),
    (73, "test_runner", "test_repr", "src/config/tests.rs", "no_debug_shows_a_token_or_a_variable"),
    (74, "test_runner", "test_serialise", "src/cli/tests/register.rs", "an_authentication_token_is_verified_with_all_we_are_and_kept_private"),
    (75, "test_runner", "test_serialise_invalid_version", "src/config/tests.rs", "an_unknown_key_names_the_nearest_one"),
    (76, "test_runner", "test_bad_init", "src/cli/tests/register.rs", "a_refused_token_leaves_no_trace"),
    (77, "test_runner", "test_invalid_token", "src/gitlab/tests/silence.rs", "a_token_no_header_can_carry_is_the_operators_to_mend"),
    (78, "test_runner", "test_invalid_name", "src/config/tests.rs", "a_name_must_do_as_a_file_name"),
    (79, "test_runner", "test_invalid_description", "src/coordinator/tests/strict.rs", "a_registration_with_a_value_of_the_wrong_kind_makes_no_runner"),
    (80, "test_runner", "test_invalid_active", "src/cli/tests/runners.rs", "values_of_the_wrong_kind_are_refused_before_gitlab_is_asked"),
    (81, "test_runner", "test_invalid_locked", "src/cli/tests/runners.rs", "values_of_the_wrong_kind_are_refused_before_gitlab_is_asked"),
    (82, "test_runner", "test_invalid_run_untagged", "src/cli/tests/runners.rs", "values_of_the_wrong_kind_are_refused_before_gitlab_is_asked"),
    (83, "test_runner", "test_invalid_tags", "src/coordinator/tests/strict.rs", "a_registration_with_a_value_of_the_wrong_kind_makes_no_runner"),
    (84, "test_runner", "test_invalid_maximum_timeout", "src/cli/tests/runners.rs", "values_of_the_wrong_kind_are_refused_before_gitlab_is_asked"),
    (85, "test_runner", "test_invalid_version", "src/coordinator/tests/strict.rs", "a_registration_with_a_value_of_the_wrong_kind_makes_no_runner"),
    (86, "test_runner", "test_invalid_revision", "src/coordinator/tests/strict.rs", "a_registration_with_a_value_of_the_wrong_kind_makes_no_runner"),
    (87, "test_runner", "test_invalid_platform", "src/coordinator/tests/strict.rs", "a_registration_with_a_value_of_the_wrong_kind_makes_no_runner"),
    (88, "test_runner", "test_invalid_architecture", "src/coordinator/tests/strict.rs", "a_registration_with_a_value_of_the_wrong_kind_makes_no_runner"),
    (89, "test_runner", "test_invalid_executor", "src/coordinator/tests/strict.rs", "a_registration_with_a_value_of_the_wrong_kind_makes_no_runner"),
    (90, "test_utils", "test_retrier_good", "tests/it/outage.rs", "a_burst_of_server_errors_costs_nothing_but_time"),
    (91, "test_utils", "test_retrier_bad", "src/job/sources/tests.rs", "attempts_are_repeated_and_the_worktree_is_cleared_before_the_second"),
];

/// Says whether a file holds a test function of this name.
fn has_test(text: &str, name: &str) -> bool {
    let wanted = format!("fn {name}(");
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    lines.iter().enumerate().any(|(at, line)| {
        let is_fn = line.strip_prefix("async ").unwrap_or(line).starts_with(&wanted);
        // Attributes stand directly above.
        let above = lines[..at].iter().rev().take_while(|line| line.starts_with("#["));
        is_fn
            && above
                .into_iter()
                .any(|line| line.starts_with("#[test]") || line.starts_with("#[tokio::test"))
    })
}

#[test]
fn every_case_of_the_ancestor_has_a_counterpart_that_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut missing = Vec::new();
    for (number, file, case, ours, name) in PROMISES {
        match std::fs::read_to_string(root.join(ours)) {
            Ok(text) if has_test(&text, name) => {}
            Ok(_) | Err(_) => missing.push(format!("{number} {file}::{case}: {ours}::{name}")),
        }
    }
    assert!(missing.is_empty(), "no such tests:\n{}", missing.join("\n"));
}

#[test]
fn the_list_is_whole() {
    let numbers: Vec<usize> = PROMISES.iter().map(|promise| promise.0).collect();
    assert_eq!(numbers, (1..=91).collect::<Vec<_>>());
    let cases: BTreeSet<(&str, &str)> =
        PROMISES.iter().map(|promise| (promise.1, promise.2)).collect();
    assert_eq!(cases.len(), 91, "each case once");
}

#[test]
fn a_name_in_a_comment_or_of_a_helper_is_no_test() {
    assert!(has_test("#[test]\nfn a_b() {", "a_b"));
    assert!(has_test("#[tokio::test(flavor = \"multi_thread\")]\nasync fn a_b() {", "a_b"));
    for text in
        ["fn a_b() {", "// #[test]\n// fn a_b() {", "#[test]\nfn a_bc() {", "#[test]\n\nfn a_b() {"]
    {
        assert!(!has_test(text, "a_b"), "{text}");
    }
}
