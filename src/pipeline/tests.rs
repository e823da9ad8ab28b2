use std::fmt::Write as _;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use proptest::prelude::*;

use super::*;

fn fixture(name: &str) -> Utf8PathBuf {
    Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pipelines").join(name)
}

fn read(text: &str) -> Pipeline {
    parse(text, "ci.yml", &LoadOptions::default()).unwrap()
}

fn refused(text: &str) -> String {
    parse(text, "ci.yml", &LoadOptions::default()).unwrap_err().to_string()
}

fn job<'a>(pipeline: &'a Pipeline, name: &str) -> &'a Job {
    &pipeline.jobs[pipeline.position(name).unwrap()]
}

fn everything() -> Pipeline {
    load(&fixture("everything.yml"), &LoadOptions::default()).unwrap()
}

mod files {
    use super::*;

    #[test]
    fn a_file_with_every_keyword_gives_these_jobs() {
        let pipeline = everything();
        let filters = [(env!("CARGO_MANIFEST_DIR"), "ROOT")];
        insta::with_settings!({snapshot_path => "snapshots", prepend_module_to_snapshot => false, filters => filters}, {
            insta::assert_debug_snapshot!("everything", (pipeline.stages, pipeline.jobs));
        });
    }

    #[test]
    fn everything_wrong_in_a_file_is_told_at_once() {
        let path = fixture("wrong.yml");
        let text = std::fs::read_to_string(path).unwrap();
        insta::with_settings!({snapshot_path => "snapshots", prepend_module_to_snapshot => false}, {
            insta::assert_snapshot!("wrong", refused(&text));
        });
    }

    #[test]
    fn unknown_words_become_notes_when_they_are_to_be_ignored() {
        let text = "include: {template: x.yml}\njob:\n  script: [a]\n  secrets: {}\n  variables: {A: {value: b, colour: red}}\n";
        let options = LoadOptions { ignore_unknown: true, ..LoadOptions::default() };
        let pipeline = parse(text, "ci.yml", &options).unwrap();
        assert_eq!(
            pipeline.notes,
            [
                "ci.yml:1: `include: template` (`x.yml`), which is part of GitLab, is not supported and ignored",
                "ci.yml:4: job `job`: `secrets` is not supported and ignored",
                "ci.yml:5: job `job`: keyword `colour` in variable `A` is not supported and ignored",
            ]
        );
        assert_eq!(pipeline.jobs[0].variables, [Variable::new("A", "b")]);
    }

    #[test]
    fn tags_are_mentioned_once() {
        let notes = everything().notes;
        let tags: Vec<_> = notes.iter().filter(|note| note.contains("`tags`")).collect();
        assert_eq!(tags.len(), 1, "{notes:?}");
    }

    #[test]
    fn a_missing_file_is_named_and_the_cause_kept() {
        let error = load(Utf8Path::new("/nowhere/ci.yml"), &LoadOptions::default()).unwrap_err();
        assert_eq!(error.to_string(), "read /nowhere/ci.yml");
        assert!(std::error::Error::source(&error).is_some());
    }

    #[test]
    fn files_without_jobs_are_refused() {
        assert_eq!(refused(""), "ci.yml:1: is empty");
        assert_eq!(refused("# nothing\n"), "ci.yml:1: is empty");
        assert_eq!(refused(".hidden: {script: [a]}\n"), "ci.yml:1: has no jobs");
        assert_eq!(refused("- a\n"), "ci.yml:1: is a list, not a mapping of jobs");
        assert!(refused("a: {stage: .pre, script: [a]}\n").contains("`.pre` and `.post` only"));
        assert!(refused("a: [\n").contains("not valid YAML"));
    }

    #[test]
    fn a_hint_names_the_keyword_that_was_meant() {
        let message = refused("a:\n  scripts: [a]\n");
        assert!(message.contains("did you mean `script`?"), "{message}");
        let message = refused("a:\n  colours: []\n  script: [a]\n");
        assert!(!message.contains("did you mean"), "{message}");
    }
}

mod keywords {
    use super::*;

    #[test]
    fn stages_have_defaults_and_edges() {
        let pipeline = read("a: {script: [a]}\n");
        assert_eq!(pipeline.stages, [".pre", "build", "test", "deploy", ".post"]);
        assert_eq!(pipeline.jobs[0].stage, "test");
        let pipeline = read("stages: [.post, x, .pre, x]\na: {stage: x, script: [a]}\n");
        assert_eq!(pipeline.stages, [".pre", "x", ".post"]);
    }

    #[test]
    fn jobs_come_in_the_order_of_their_stages() {
        let text = "c: {stage: deploy, script: [a]}\na: {script: [a]}\nb: {script: [a]}\np: {stage: .pre, script: [a]}\n";
        let names: Vec<_> = read(text).jobs.into_iter().map(|job| job.name).collect();
        assert_eq!(names, ["p", "a", "b", "c"]);
    }

    #[test]
    fn a_manual_job_may_fail_unless_it_says_otherwise() {
        let pipeline = everything();
        assert_eq!(job(&pipeline, "by hand").allow_failure, AllowFailure::Always);
        assert_eq!(job(&pipeline, "must").allow_failure, AllowFailure::Never);
    }

    #[test]
    fn an_empty_value_inherits_and_an_empty_list_does_not() {
        let pipeline = everything();
        assert_eq!(job(&pipeline, "by hand").after_script, ["echo default after"]);
        assert!(job(&pipeline, "must").after_script.is_empty());
    }

    #[test]
    fn timeouts_are_the_job_s_or_the_default_s() {
        let pipeline = everything();
        assert_eq!(job(&pipeline, "must").timeout, Some(Duration::from_secs(7200)));
        assert_eq!(job(&pipeline, "merged").timeout, Some(Duration::from_secs(1800)));
        assert_eq!(read("a: {script: [a], timeout: 90}\n").jobs[0].timeout.unwrap().as_secs(), 90);
        assert_eq!(read("a: {script: [a]}\n").jobs[0].timeout, None);
    }

    #[test]
    fn scripts_flatten_ten_levels_and_no_more() {
        let nested =
            |levels| format!("a: {{script: {}echo{}}}\n", "[".repeat(levels), "]".repeat(levels));
        assert_eq!(read(&nested(11)).jobs[0].script, ["echo"]);
        assert!(refused(&nested(12)).contains("deeper than 10 levels"));
    }

    #[test]
    fn top_level_scripts_are_defaults_and_cannot_be_given_twice() {
        let pipeline = read("before_script: [b]\na: {script: [a]}\n");
        assert_eq!(pipeline.jobs[0].script, ["b", "a"]);
        let message =
            refused("before_script: [b]\ndefault: {before_script: [c]}\na: {script: [a]}\n");
        assert!(message.contains("at the top and in `default`"), "{message}");
    }
}

mod extending {
    use super::*;

    #[test]
    fn ten_levels_are_followed_and_eleven_are_not_whatever_the_order() {
        let chain = |levels: usize, reversed: bool| {
            let mut jobs = vec![".j0: {script: [a], variables: {L0: x}}".to_owned()];
            for level in 1..=levels {
                let below = level - 1;
                jobs.push(format!(".j{level}: {{extends: .j{below}, variables: {{L{level}: x}}}}"));
            }
            jobs.push("job: {script: [a]}".to_owned());
            if reversed {
                jobs.reverse();
            }
            jobs.join("\n").replace(&format!(".j{levels}:"), "top:")
        };
        for reversed in [false, true] {
            let pipeline = read(&chain(10, reversed));
            assert_eq!(job(&pipeline, "top").variables.len(), 11);
            assert!(refused(&chain(11, reversed)).contains("deeper than 10 levels"));
        }
        assert!(refused(&chain(3000, true)).contains("deeper than 10 levels"));
    }

    #[test]
    fn a_circle_is_shown_once_and_other_faults_beside_it() {
        let text = "a: {extends: b, script: [x]}\nb: {extends: c}\nc: {extends: a}\nd: {}\n";
        let message = refused(text);
        assert_eq!(message.matches("circle").count(), 1, "{message}");
        assert!(message.contains("a → b → c → a"), "{message}");
        assert!(message.contains("job `d`: has no `script`"), "{message}");
    }

    #[test]
    fn a_need_of_a_job_that_could_not_be_read_is_not_also_missed() {
        let message = refused("a: {extends: nobody, script: [x]}\nb: {script: [x], needs: [a]}\n");
        assert_eq!(message, "ci.yml:1: job `a`: extends `nobody`, which does not exist");
    }

    #[test]
    fn wrong_bases_are_refused() {
        assert!(refused("a: {extends: 1, script: [x]}\n").contains("takes a name or a list"));
        assert!(refused(".l: [x]\na: {extends: .l, script: [x]}\n").contains("not a mapping"));
    }
}

mod references {
    use super::*;

    #[test]
    fn references_see_what_extends_made_and_follow_each_other() {
        let text = "
.a: {script: [one]}
.b: {extends: .a, variables: {X: y}}
.c: {script: [!reference [.b, script], two]}
job:
  script: [!reference [.c, script], three]
  variables: !reference [.b, variables]
";
        let pipeline = read(text);
        assert_eq!(pipeline.jobs[0].script, ["one", "two", "three"]);
        assert_eq!(pipeline.jobs[0].variables, [Variable::new("X", "y")]);
    }

    #[test]
    fn circles_and_dead_ends_are_refused() {
        let circle = refused(
            ".a: {script: [!reference [.b, script]]}\n.b: {script: [!reference [.a, script]]}\nj: {script: [x]}\n",
        );
        assert!(circle.contains("leads back to itself"), "{circle}");
        assert!(refused("j: {script: [!reference [j, nothing]]}\n").contains("leads nowhere"));
        assert!(refused("j: {script: [!reference [j, script, x]]}\n").contains("leads nowhere"));
    }

    #[test]
    fn long_chains_and_bombs_of_references_are_refused_quietly() {
        let mut chain = String::from(".j0: {script: [x]}\n");
        for level in 1..2000 {
            writeln!(chain, ".j{level}: {{script: [!reference [.j{}, script]]}}", level - 1)
                .unwrap();
        }
        let reversed: Vec<_> = chain.lines().rev().collect();
        assert!(
            refused(&format!("{}\nj: {{script: [x]}}\n", reversed.join("\n")))
                .contains("too deeply")
        );
        let mut bomb = String::from(".j0: {script: [x]}\n");
        for level in 1..12 {
            let again = vec![format!("!reference [.j{}, script]", level - 1); 10].join(", ");
            writeln!(bomb, ".j{level}: {{script: [{again}]}}").unwrap();
        }
        assert!(refused(&format!("{bomb}j: {{script: [x]}}\n")).contains("too large"));
    }
}

mod running {
    use super::*;

    const OK: Ended = Ended { success: true, exit_code: Some(0), cancelled: false };
    const BAD: Ended = Ended { success: false, exit_code: Some(1), cancelled: false };
    const STOPPED: Ended = Ended { success: false, exit_code: None, cancelled: true };

    /// Plays a pipeline in which the named jobs end as given and all others succeed.
    fn play(pipeline: &Pipeline, selected: &[&str], ends: &[(&str, Ended)]) -> Run {
        let selected: Vec<String> = selected.iter().map(|name| (*name).to_owned()).collect();
        let mut run = Run::with_manual(pipeline, &selected);
        loop {
            let startable = run.startable();
            if startable.is_empty() {
                assert!(run.result().is_some(), "nothing can start and nothing is over: {run:?}");
                return run;
            }
            for place in startable {
                run.started(place);
                let name = &pipeline.jobs[place].name;
                let end = ends.iter().find(|(known, _)| known == name).map_or(OK, |(_, end)| *end);
                run.ended(place, end);
            }
        }
    }

    fn fates(pipeline: &Pipeline, run: &Run) -> String {
        let fates = pipeline
            .jobs
            .iter()
            .enumerate()
            .map(|(place, job)| format!("{}: {}", job.name, run.fate(place).unwrap()));
        format!("{} → {}", fates.collect::<Vec<_>>().join(", "), run.result().unwrap())
    }

    #[test]
    fn each_of_these_pipelines_ends_as_gitlab_would_end_it() {
        let stages =
            "a: {stage: build, script: [x]}\nb: {script: [x]}\nc: {stage: deploy, script: [x]}\n";
        let cleanup = "a: {stage: build, script: [x]}\nb: {script: [x]}\nf: {when: on_failure, script: [x]}\nz: {when: always, stage: .post, script: [x]}\n";
        let codes =
            "a: {stage: build, script: [x], allow_failure: {exit_codes: [3]}}\nb: {script: [x]}\n";
        let dag = "a: {stage: build, script: [x]}\nb: {stage: build, script: [x]}\nc: {needs: [a], script: [x]}\nd: {needs: [c], when: on_failure, script: [x]}\n";
        let manual = "m: {stage: build, when: manual, script: [x]}\nb: {script: [x]}\nn: {needs: [m], script: [x]}\n";
        let must = "a: {stage: build, script: [x]}\nm: {stage: build, when: manual, allow_failure: false, script: [x]}\nb: {script: [x]}\nz: {stage: .post, when: always, script: [x]}\n";
        let stopped = Ended { exit_code: Some(3), ..BAD };
        let mut played = String::new();
        type Case<'a> = (&'a str, &'a str, &'a [&'a str], &'a [(&'a str, Ended)]);
        let cases: &[Case<'_>] = &[
            ("all well", stages, &[], &[]),
            ("a fails", stages, &[], &[("a", BAD)]),
            ("b is stopped", stages, &[], &[("b", STOPPED)]),
            ("clean-up after success", cleanup, &[], &[]),
            ("clean-up after failure", cleanup, &[], &[("a", BAD)]),
            ("clean-up after a stop", cleanup, &[], &[("a", STOPPED)]),
            ("an allowed exit code", codes, &[], &[("a", stopped)]),
            ("another exit code", codes, &[], &[("a", BAD)]),
            ("needs overtake a failure", dag, &[], &[("b", BAD)]),
            ("a need fails", dag, &[], &[("a", BAD)]),
            ("needed by an on_failure", dag, &[], &[("c", BAD)]),
            ("manual not asked for", manual, &[], &[]),
            ("manual asked for", manual, &["m"], &[]),
            ("manual asked for fails", manual, &["m"], &[("m", BAD)]),
            ("a blocking manual job", must, &[], &[]),
            ("a blocking manual job and a failure", must, &[], &[("a", BAD)]),
            ("a blocking manual job asked for", must, &["m"], &[]),
        ];
        for (what, text, selected, ends) in cases {
            let pipeline = read(text);
            let run = play(&pipeline, selected, ends);
            writeln!(played, "{what}: {}", fates(&pipeline, &run)).unwrap();
        }
        insta::with_settings!({snapshot_path => "snapshots", prepend_module_to_snapshot => false}, {
            insta::assert_snapshot!("fates", played);
        });
    }

    #[test]
    fn a_job_with_needs_starts_before_its_stage_s_turn() {
        let pipeline = read(
            "a: {stage: build, script: [x]}\nb: {stage: build, script: [x]}\nc: {needs: [a], script: [x]}\nd: {needs: [], stage: deploy, script: [x]}\n",
        );
        let mut run = Run::new(&pipeline);
        assert_eq!(run.startable(), [0, 1, 3]);
        run.started(0);
        assert_eq!(run.startable(), [1, 3]);
        run.ended(0, OK);
        assert_eq!(run.startable(), [1, 2, 3]);
        assert_eq!(run.result(), None);
    }

    #[test]
    fn the_first_end_of_a_job_counts_and_only_when_it_was_its_turn() {
        let pipeline = read("a: {stage: build, script: [x]}\nb: {script: [x]}\n");
        let mut run = Run::new(&pipeline);
        run.ended(1, OK);
        run.ended(99, OK);
        assert_eq!(run.fate(1), None);
        run.ended(0, BAD);
        run.ended(0, OK);
        assert_eq!(run.fate(0), Some(Fate::Failed));
        assert_eq!(run.result(), Some(PipelineResult::Failed));
    }

    #[test]
    fn cancelling_ends_what_has_not_begun_and_waits_for_what_has() {
        let pipeline = read(
            "a: {stage: build, script: [x]}\nb: {stage: build, script: [x]}\nc: {script: [x]}\nm: {stage: build, when: manual, allow_failure: false, script: [x]}\n",
        );
        let mut run = Run::new(&pipeline);
        run.started(0);
        run.cancel();
        assert_eq!((run.startable(), run.result()), (vec![], None));
        run.ended(0, STOPPED);
        assert_eq!(run.result(), Some(PipelineResult::Cancelled));
        assert!(!run.result().unwrap().is_success());
    }

    #[test]
    fn manual_jobs_left_out_are_noted() {
        let pipeline = everything();
        let run = play(&pipeline, &[], &[]);
        assert_eq!(run.notes(), ["not run, because manual and not asked for: `by hand`, `must`"]);
    }

    #[derive(Clone, Debug)]
    struct Plan {
        pipeline: Pipeline,
        ends: Vec<Ended>,
        order: Vec<usize>,
        selected: Vec<String>,
    }

    fn plans() -> impl Strategy<Value = Plan> {
        let job = (
            0..5_usize,
            0..5_u8,
            0..3_u8,
            proptest::option::of(proptest::collection::vec(any::<prop::sample::Index>(), 0..4)),
            0..3_u8,
            any::<bool>(),
        );
        let jobs = proptest::collection::vec(job, 1..14);
        (jobs, proptest::collection::vec(any::<usize>(), 60)).prop_map(|(mut drawn, order)| {
            drawn.sort_by_key(|job| job.0);
            let mut plan = Plan {
                pipeline: Pipeline {
                    stages: (0..5).map(|stage| format!("s{stage}")).collect(),
                    ..Pipeline::default()
                },
                ends: Vec::new(),
                order,
                selected: Vec::new(),
            };
            for (place, (stage, when, allow, needs, end, select)) in drawn.into_iter().enumerate() {
                let name = format!("j{place}");
                if select {
                    plan.selected.push(name.clone());
                }
                plan.ends.push([OK, BAD, STOPPED][usize::from(end)]);
                let mut needs: Option<Vec<String>> = needs.map(|needs| {
                    needs
                        .iter()
                        .filter(|_| place > 0)
                        .map(|need| format!("j{}", need.index(place)))
                        .collect()
                });
                if let Some(needs) = &mut needs {
                    needs.sort();
                    needs.dedup();
                }
                plan.pipeline.jobs.push(Job {
                    name,
                    stage: format!("s{stage}"),
                    script: vec!["x".into()],
                    needs: needs.map(|needs| {
                        needs
                            .into_iter()
                            .map(|job| Need { job, optional: false, artifacts: true })
                            .collect()
                    }),
                    allow_failure: match allow {
                        0 => AllowFailure::Never,
                        1 => AllowFailure::Always,
                        _ => AllowFailure::ExitCodes(vec![1]),
                    },
                    when: match when {
                        0 | 1 => When::OnSuccess,
                        2 => When::OnFailure,
                        3 => When::Always,
                        _ => When::Manual,
                    },
                    ..Job::default()
                });
            }
            plan
        })
    }

    proptest! {
        #[test]
        fn every_run_ends_with_exactly_one_fate_for_every_job(plan in plans()) {
            let mut run = Run::with_manual(&plan.pipeline, &plan.selected);
            let mut fates: Vec<Option<Fate>> = vec![None; plan.pipeline.jobs.len()];
            let mut running: Vec<JobIndex> = Vec::new();
            let mut ran = vec![false; plan.pipeline.jobs.len()];
            let mut turns = plan.order.iter().cycle();
            for _ in 0..=plan.pipeline.jobs.len() {
                for place in run.startable() {
                    prop_assert!(!ran[place], "job {} started twice", place);
                    ran[place] = true;
                    run.started(place);
                    running.push(place);
                }
                for (place, fate) in fates.iter_mut().enumerate() {
                    let now = run.fate(place);
                    prop_assert!(fate.is_none() || *fate == now, "the fate of {} changed", place);
                    *fate = now;
                }
                if running.is_empty() {
                    break;
                }
                prop_assert_eq!(run.result(), None);
                let next = running.swap_remove(turns.next().unwrap() % running.len());
                run.ended(next, plan.ends[next]);
                prop_assert!(run.fate(next).is_some());
            }
            prop_assert!(running.is_empty());
            prop_assert!(run.startable().is_empty());
            prop_assert!(run.result().is_some());
            for (place, fate) in fates.iter().enumerate() {
                let fate = fate.unwrap();
                prop_assert_eq!(ran[place], !matches!(fate, Fate::Skipped(_)));
            }
            // A failure that nobody allowed is never lost in the sum.
            if fates.contains(&Some(Fate::Failed)) {
                prop_assert_eq!(run.result(), Some(PipelineResult::Failed));
            } else {
                prop_assert_ne!(run.result(), Some(PipelineResult::Failed));
            }
        }

        #[test]
        fn no_damage_to_a_good_file_makes_the_reader_panic(
            cuts in proptest::collection::vec((any::<prop::sample::Index>(), 0..6_u8), 1..8),
        ) {
            let text = std::fs::read_to_string(fixture("everything.yml")).unwrap();
            let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
            for (index, damage) in cuts {
                let place = index.index(lines.len());
                let line = lines[place].clone();
                match damage {
                    0 => drop(lines.remove(place)),
                    1 => lines.insert(place, line),
                    2 => lines[place] = line.split(':').next().unwrap().to_owned(),
                    3 => lines[place] = line.replace('e', "[").replace('a', ": "),
                    4 => lines[place] = format!("  {line}"),
                    _ => lines[place] = line.trim_start().to_owned(),
                }
                if lines.is_empty() {
                    lines.push(String::new());
                }
            }
            let options = LoadOptions { ignore_unknown: true, ..LoadOptions::default() };
            if let Ok(pipeline) = parse(&lines.join("\n"), "ci.yml", &options) {
                // Whatever is accepted can be played to its end.
                play(&pipeline, &[], &[]);
            }
        }

        #[test]
        fn no_text_makes_the_reader_panic(text in "[a-c.<*&!:\\[\\]{}, \n\\-'\"0-9]{0,120}") {
            // Only that it returns: most of these are no YAML.
            drop(parse(&text, "ci.yml", &LoadOptions { ignore_unknown: true, ..LoadOptions::default() }));
        }
    }
}

mod example {
    use super::*;

    /// Runs one job's lines as its shell would.
    fn shell(folder: &Utf8Path, job: &Job, lines: &[String]) -> (Option<i32>, String) {
        let output = std::process::Command::new("bash")
            .args(["-c", &format!("set -eo pipefail\n{}", lines.join("\n"))])
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("CI_JOB_NAME", &job.name)
            .envs(job.variables.iter().map(|variable| (&variable.name, &variable.value)))
            .current_dir(folder)
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    }

    #[test]
    fn the_example_shows_all_it_promises_and_passes_with_a_warning() {
        let folder = Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/hello");
        let pipeline = load(&folder.join(".gitlab-ci.yml"), &LoadOptions::default()).unwrap();
        assert!(pipeline.notes.is_empty(), "{:?}", pipeline.notes);
        assert_eq!(pipeline.stages, [".pre", "prepare", "check", "greet", ".post"]);
        let mut run = Run::new(&pipeline);
        let mut written = String::new();
        while let Some(place) = run.startable().first().copied() {
            let job = &pipeline.jobs[place];
            run.started(place);
            let (code, output) = shell(&folder, job, &job.script);
            let (after, later) = shell(&folder, job, &job.after_script);
            assert_eq!(after, Some(0));
            written.push_str(&output);
            written.push_str(&later);
            run.ended(place, Ended { success: code == Some(0), exit_code: code, cancelled: false });
        }
        assert_eq!(run.result(), Some(PipelineResult::PassedWithWarnings), "{written}");
        let spelling = pipeline.position("spelling").unwrap();
        assert_eq!(run.fate(spelling), Some(Fate::FailureAllowed));
        for shown in [
            "section_start:",
            "section_end:",
            "\u{1b}[32mHello, world!",
            "Hello, everybody!",
            "and nobody minds",
            "that was everybody",
        ] {
            assert!(written.contains(shown), "{shown:?} is not in {written}");
        }
    }
}
