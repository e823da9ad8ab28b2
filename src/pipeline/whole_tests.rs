//! Whole pipelines: rules, includes, inputs, matrices, and those of public projects in outline.

use std::fmt::Write as _;
use std::fs;

use camino::{Utf8Path, Utf8PathBuf};

use super::*;

fn vars(pairs: &[(&str, &str)]) -> Vec<Variable> {
    pairs.iter().map(|(name, value)| Variable::new(*name, *value)).collect()
}

/// A push to `main` of a project with some files.
fn pushed() -> LoadOptions {
    let files = [".gitlab-ci.yml", "Cargo.lock", "docs/a.md", "src/deep/lib.rs"];
    let project = Project {
        files: files
            .iter()
            .map(|path| TreeFile { path: (*path).to_owned(), blob: format!("blob of {path}") })
            .collect(),
        changed: Some(vec!["docs/a.md".to_owned()]),
        variables: vars(&[
            ("CI_PIPELINE_SOURCE", "push"),
            ("CI_COMMIT_BRANCH", "main"),
            ("CI_COMMIT_REF_NAME", "main"),
            ("CI_DEFAULT_BRANCH", "main"),
            ("CI_PROJECT_PATH", "group/project"),
        ]),
        ref_name: "main".to_owned(),
        ..Project::default()
    };
    LoadOptions { project, ..LoadOptions::default() }
}

fn read(text: &str) -> Pipeline {
    with(text, &pushed())
}

fn with(text: &str, options: &LoadOptions) -> Pipeline {
    parse(text, "ci.yml", options).unwrap_or_else(|error| panic!("{error}"))
}

fn refused(text: &str) -> String {
    parse(text, "ci.yml", &pushed()).unwrap_err().to_string()
}

/// The jobs there are, and those there are not with the reason.
fn told(pipeline: &Pipeline) -> String {
    let mut told = String::new();
    for job in &pipeline.jobs {
        let needs = job.needs.as_ref().map(|needs| {
            needs.iter().map(|need| need.job.as_str()).collect::<Vec<_>>().join(" + ")
        });
        let needs = needs.map_or(String::new(), |needs| format!(" after [{needs}]"));
        writeln!(told, "{} {:?} {:?}{needs}", job.name, job.when, job.allow_failure).unwrap();
    }
    for left in &pipeline.left_out {
        writeln!(told, "not {}: {}", left.name, left.why).unwrap();
    }
    told
}

fn value(pipeline: &Pipeline, job: &str, name: &str) -> Option<String> {
    let job = &pipeline.jobs[pipeline.position(job).unwrap()];
    job.variables.iter().find(|variable| variable.name == name).map(|v| v.value.clone())
}

mod rules {
    use super::*;

    #[test]
    fn the_first_rule_that_fits_decides() {
        let pipeline = read("
a: {script: x, rules: [{if: $CI_COMMIT_BRANCH == $CI_DEFAULT_BRANCH}]}
b: {script: x, rules: [{if: $CI_COMMIT_TAG}]}
c: {script: x, rules: [{if: $CI_COMMIT_TAG}, {when: never}]}
d: {script: x, rules: [{when: manual}]}
e: {script: x, when: manual, rules: [{if: $CI_COMMIT_BRANCH}]}
f: {script: x, rules: [{if: $CI_COMMIT_BRANCH, when: always, allow_failure: true}]}
g: {script: x, allow_failure: {exit_codes: 3}, rules: [{if: $CI_COMMIT_BRANCH, allow_failure: false}]}
h: {script: x, rules: [{if: $CI_COMMIT_BRANCH, changes: [src/*]}, {changes: [docs/**/*], when: on_failure}]}
i: {script: x, rules: [{exists: ['**/*.rs']}]}
j: {script: x, rules: [{exists: [lib.rs, '*.rs', src/*.rs]}]}
k: {script: x, rules: [{exists: [Cargo.lock], changes: {paths: [docs/a.md]}}]}
l: {script: x, rules: []}
m: {script: x, needs: [a], rules: [{if: $CI_COMMIT_BRANCH, needs: [f]}]}
n: {script: x, rules: [[{if: $NOTHING}], [[{when: delayed, start_in: 3 hours}]]]}
");
        insta::assert_snapshot!(told(&pipeline), @r"
        a OnSuccess Never
        d Manual Never
        e Manual Always
        f Always Always
        g OnSuccess Never
        h OnFailure Never
        i OnSuccess Never
        k OnSuccess Never
        m OnSuccess Never after [f]
        n OnSuccess Never
        not b: no rule fits
        not c: the rule at ci.yml:4 says never
        not j: no rule fits
        not l: no rule fits
        ");
    }

    #[test]
    fn only_and_except_decide_for_jobs_without_rules() {
        let pipeline = read(
            "
a: {script: x, only: [main]}
b: {script: x, only: [tags]}
c: {script: x, only: [/^ma/, other]}
d: {script: x, except: [branches]}
e: {script: x, only: [pushes]}
f: {script: x, only: {variables: [$CI_COMMIT_BRANCH == 'main'], refs: [schedules]}}
g: {script: x, only: {changes: ['docs/*']}}
h: {script: x, except: {changes: ['docs/*']}}
i: {script: x, only: [main@group/project]}
j: {script: x, only: [main@other/project]}
k: {script: x, only: [/^MA/i@group/project], except: {variables: [$NOTHING]}}
l: {script: x, only: {kubernetes: active}}
",
        );
        insta::assert_snapshot!(told(&pipeline), @r"
        a OnSuccess Never
        c OnSuccess Never
        e OnSuccess Never
        g OnSuccess Never
        i OnSuccess Never
        k OnSuccess Never
        not b: `only: refs` does not fit
        not d: `except: refs` fits
        not f: `only: refs` does not fit
        not h: `except: changes` fits
        not j: `only: refs` does not fit
        not l: `only: kubernetes` does not fit
        ");
    }

    #[test]
    fn tags_and_first_commits_fulfil_every_changes() {
        let mut options = pushed();
        options.project.changed = None;
        let text = "a: {script: x, rules: [{changes: [nothing]}]}\n";
        assert_eq!(with(text, &options).jobs.len(), 1);
    }

    #[test]
    fn a_job_may_not_need_what_the_rules_leave_out() {
        let text = "a: {script: x, rules: [{when: never}]}\nb: {script: x, needs: [a]}\n";
        assert_eq!(
            refused(text),
            "ci.yml:2: job `b`: needs `a`, which is not in the pipeline (the rule at ci.yml:1 says \
             never); `optional: true` would do"
        );
        let pipeline = read(
            "a: {script: x, rules: [{when: never}]}\nb: {script: x, needs: [{job: a, optional: true}]}\n",
        );
        assert_eq!(pipeline.jobs[0].needs, Some(vec![]));
    }

    #[test]
    fn the_workflow_decides_about_all_and_gives_variables() {
        let text = "
workflow:
  name: 'for $WHO'
  rules:
    - if: $CI_PIPELINE_SOURCE == 'schedule'
      when: never
    - if: $CI_COMMIT_BRANCH == 'main'
      variables: {WHO: main, OWN: workflow}
variables: {WHO: nobody}
a: {script: x, variables: {OWN: job}, rules: [{if: $WHO == 'main', variables: {LATE: rule}}]}
";
        let pipeline = read(text);
        assert_eq!(pipeline.name.as_deref(), Some("for main"));
        assert_eq!(value(&pipeline, "a", "WHO").unwrap(), "main");
        assert_eq!(value(&pipeline, "a", "OWN").unwrap(), "job");
        assert_eq!(value(&pipeline, "a", "LATE").unwrap(), "rule");
        let scheduled =
            LoadOptions { variables: vars(&[("CI_PIPELINE_SOURCE", "schedule")]), ..pushed() };
        let error = parse(text, "ci.yml", &scheduled).unwrap_err().to_string();
        assert_eq!(error, "ci.yml:5: `workflow: rules` start no pipeline: this one says never");
        let none = refused("workflow: {rules: [{if: $CI_COMMIT_TAG}]}\na: {script: x}\n");
        assert!(none.contains("none fits `main` with CI_PIPELINE_SOURCE=push"), "{none}");
    }

    #[test]
    fn what_is_wrong_with_rules_is_told_with_its_line() {
        let message = refused(
            "
a:
  script: x
  rules:
    - if: $A ==
    - if: $B
      whenn: never
    - changes: {compare_to: nowhere, paths: [x]}
b: {script: x, only: [main], rules: [{if: $A}]}
",
        );
        insta::assert_snapshot!(message, @r"
        4 problems in the pipeline
          ci.yml:5: job `a`: `if` lacks a value beside an operator
          ci.yml:7: job `a`: keyword `whenn` in `rules` is not supported, unless --ignore-unknown; did you mean `when`?
          ci.yml:8: job `a`: `compare_to: nowhere` is no branch, tag or commit here
          ci.yml:9: job `b`: has `rules` and `only` or `except`, which exclude each other
        ");
    }
}

mod variables {
    use super::*;

    #[test]
    fn the_stronger_wins_and_given_ones_win_over_all() {
        let text = "
variables: {A: global, B: global, C: global, D: {value: one, options: [one, two]}, R: {value: $A, expand: false}}
j: {script: x, variables: {B: job, C: job}, rules: [{if: $B == 'job', variables: {C: rule}}]}
none: {script: x, inherit: {variables: false}}
some: {script: x, inherit: {variables: [A]}}
";
        let mut options = pushed();
        let pipeline = with(text, &options);
        let all = |job: &str| ["A", "B", "C", "D"].map(|name| value(&pipeline, job, name));
        assert_eq!(all("j"), ["global", "job", "rule", "one"].map(|text| Some(text.to_owned())));
        assert_eq!(all("none"), [None, None, None, None]);
        assert_eq!(all("some"), [Some("global".to_owned()), None, None, None]);
        assert!(pipeline.jobs[0].variables.iter().any(|v| v.name == "R" && v.raw));
        options.variables = vars(&[("C", "given"), ("D", "two")]);
        let pipeline = with(text, &options);
        assert_eq!(value(&pipeline, "j", "C").unwrap(), "given");
        assert_eq!(value(&pipeline, "none", "D").unwrap(), "two");
        options.variables = vars(&[("D", "three")]);
        let error = parse(text, "ci.yml", &options).unwrap_err().to_string();
        assert!(error.contains("`D` is given as `three`, which is none of one, two"), "{error}");
    }

    #[test]
    fn defaults_reach_jobs_that_take_them() {
        let pipeline = read(
            "
default: {before_script: [d], retry: 1, cache: {paths: [c]}, artifacts: {paths: [o]}}
a: {script: x}
b: {script: x, inherit: {default: false}}
c: {script: x, inherit: {default: [retry]}, cache: []}
",
        );
        let facts: Vec<_> = pipeline
            .jobs
            .iter()
            .map(|job| (job.script.len(), job.retry.max, job.caches.len(), job.artifacts.is_some()))
            .collect();
        assert_eq!(facts, [(2, 1, 1, true), (1, 0, 0, false), (1, 1, 0, false)]);
    }
}

mod several {
    use super::*;

    #[test]
    fn instances_are_named_and_needed_as_gitlab_does() {
        let pipeline = read(
            "
stages: [build, test]
n: {stage: build, script: x, parallel: 2}
m:
  stage: build
  script: x
  parallel: {matrix: [{OS: [linux, mac], CC: gcc}, {OS: bsd, CC: [clang]}]}
all: {script: x, needs: [n, m]}
one: {script: x, needs: [{job: m, parallel: {matrix: [{OS: mac, CC: gcc}]}}, n 2/2]}
own:
  script: x
  parallel: {matrix: [{OS: [linux, mac]}]}
  needs: [{job: m, parallel: {matrix: [{OS: '$[[ matrix.OS ]]', CC: gcc}]}}]
old: {script: x, dependencies: [m]}
only-mac: {script: x, parallel: {matrix: [{OS: [linux, mac]}]}, rules: [{if: $OS == 'mac'}]}
",
        );
        insta::assert_snapshot!(told(&pipeline), @r"
        n 1/2 OnSuccess Never
        n 2/2 OnSuccess Never
        m: [linux, gcc] OnSuccess Never
        m: [mac, gcc] OnSuccess Never
        m: [bsd, clang] OnSuccess Never
        all OnSuccess Never after [n 1/2 + n 2/2 + m: [linux, gcc] + m: [mac, gcc] + m: [bsd, clang]]
        one OnSuccess Never after [m: [mac, gcc] + n 2/2]
        own: [linux] OnSuccess Never after [m: [linux, gcc]]
        own: [mac] OnSuccess Never after [m: [mac, gcc]]
        old OnSuccess Never
        only-mac: [mac] OnSuccess Never
        not only-mac: [linux]: no rule fits
        ");
        assert_eq!(value(&pipeline, "n 2/2", "CI_NODE_INDEX").unwrap(), "2");
        assert_eq!(value(&pipeline, "m: [mac, gcc]", "OS").unwrap(), "mac");
        assert_eq!(value(&pipeline, "m: [mac, gcc]", "CI_NODE_TOTAL").unwrap(), "3");
        let old = pipeline.position("old").unwrap();
        assert_eq!(pipeline.artifacts_for(old).len(), 3);
        assert_eq!(pipeline.named("m").len(), 3);
        assert!(refused("a: {script: x, parallel: 0}\n").contains("from 1 to 200"));
        let wrong = "a: {script: x, parallel: {matrix: [{A: [1]}]}}\nb: {script: x, needs: [{job: a, parallel: {matrix: [{A: 2}]}}]}\n";
        assert!(refused(wrong).contains("needs `a: [2]`, which `a` has not"));
    }

    #[test]
    fn part_of_a_pipeline_has_all_that_its_jobs_need() {
        let pipeline = read(
            "
stages: [one, two, three]
a: {stage: one, script: x}
b: {stage: one, script: x}
hand: {stage: one, script: x, when: manual}
c: {stage: two, script: x, needs: [b]}
d: {stage: three, script: x, needs: [c]}
e: {stage: three, script: x}
f: {stage: three, script: x, dependencies: [hand]}
",
        );
        let names = |wanted: &str| {
            let part = pipeline.only(&pipeline.named(wanted));
            part.jobs.into_iter().map(|job| job.name).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(names("d"), "b c d");
        assert_eq!(names("e"), "a b c e");
        assert_eq!(names("f"), "hand f");
        let gets = |name: &str| {
            let places = pipeline.artifacts_for(pipeline.position(name).unwrap());
            places.into_iter().map(|place| pipeline.jobs[place].name.clone()).collect::<Vec<_>>()
        };
        assert_eq!(gets("d"), ["c"]);
        assert_eq!(gets("f"), ["hand"]);
        assert_eq!(gets("e"), ["a", "b", "hand", "c"]);
    }

    #[test]
    fn trigger_jobs_are_named_and_left_out() {
        let pipeline = read("t: {trigger: other/project}\na: {script: x, needs: [t]}\n");
        assert_eq!(pipeline.jobs.len(), 1);
        assert_eq!(pipeline.jobs[0].needs, Some(vec![]));
        assert_eq!(pipeline.notes.len(), 2, "{:?}", pipeline.notes);
        assert!(pipeline.notes[0].starts_with("ci.yml:1: job `t`: `trigger`"));
    }
}

mod artifacts_and_caches {
    use super::*;

    #[test]
    fn they_arrive_with_their_keys_worked_out() {
        let pipeline = read(
            "
a:
  script: x
  artifacts:
    name: $CI_JOB_NAME
    paths: [out/]
    exclude: out/*.o
    untracked: true
    when: always
    expire_in: 1 week
    reports:
      junit: [a.xml, b.xml]
      dotenv: x.env
      coverage_report: {coverage_format: cobertura, path: cov.xml}
  cache:
    - {key: fixed-$CI_COMMIT_REF_SLUG, paths: [one], policy: pull, fallback_keys: [older]}
    - {key: {files: [Cargo.lock], prefix: rust}, paths: [two], when: always}
    - {key: {files: [absent]}, paths: [three], unprotect: true}
  retry: {max: 2, when: [runner_system_failure], exit_codes: [3, 4]}
",
        );
        let job = &pipeline.jobs[0];
        insta::with_settings!({snapshot_path => "snapshots", prepend_module_to_snapshot => false}, {
            insta::assert_debug_snapshot!("artifacts_and_caches", (&job.artifacts, &job.caches));
        });
        assert!(job.retry.again(1, Some("script_failure"), Some(4)));
        assert!(!job.retry.again(1, Some("script_failure"), Some(5)));
        assert!(job.retry.again(2, Some("runner_system_failure"), None));
        assert!(!job.retry.again(3, Some("runner_system_failure"), None));
        for (text, says) in [
            ("a: {script: x, cache: {key: a/b, paths: [c]}}", "a file's name"),
            ("a: {script: x, cache: {paths: [c], policy: shove}}", "none of pull-push"),
            ("a: {script: x, retry: 3}", "0, 1 or 2"),
            ("a: {script: x, artifacts: {pathes: [c]}}", "did you mean `paths`"),
            ("a: {script: x, artifacts: {reports: {junits: c}}}", "did you mean `junit`"),
            ("a: {script: x, dependencies: [b]}", "depends on `b`"),
        ] {
            assert!(refused(text).contains(says), "{}", refused(text));
        }
    }
}

mod files {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> (tempfile::TempDir, LoadOptions) {
        let guard = tempfile::tempdir().unwrap();
        let root = Utf8Path::from_path(guard.path()).unwrap().to_owned();
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let mut options = pushed();
        options.project.root = root;
        (guard, options)
    }

    fn loaded(files: &[(&str, &str)]) -> Result<Pipeline, String> {
        let (_guard, options) = folder(files);
        let path = options.project.root.join(".gitlab-ci.yml");
        let read = load(&path, &options);
        read.map_err(|error| error.to_string().replace(options.project.root.as_str(), "DIR"))
    }

    #[test]
    fn local_includes_lie_below_the_file_and_may_include_more() {
        let pipeline = loaded(&[
            (".gitlab-ci.yml", "include: [ci/a.yml, {local: '/ci/jobs/*.yml'}, {local: ci/never.yml, rules: [{if: $CI_COMMIT_TAG}]}]\nvariables: {A: main}\nb: {variables: {OWN: main}}\n"),
            ("ci/a.yml", "include: {local: ci/base.yml}\nvariables: {A: a, B: a}\n"),
            ("ci/base.yml", ".base: {script: [base], variables: {OWN: base, KEPT: base}}\n"),
            ("ci/jobs/b.yml", "b: {extends: .base}\n"),
            ("ci/jobs/c.yml", "c: {script: !reference [.base, script]}\n"),
            ("ci/jobs/not.txt", "nonsense: ["),
        ])
        .unwrap();
        let names: Vec<_> = pipeline.jobs.iter().map(|job| job.name.as_str()).collect();
        assert_eq!(names, ["b", "c"]);
        assert_eq!(value(&pipeline, "b", "A").unwrap(), "main");
        assert_eq!(value(&pipeline, "b", "B").unwrap(), "a");
        assert_eq!(value(&pipeline, "b", "OWN").unwrap(), "main");
        assert_eq!(value(&pipeline, "b", "KEPT").unwrap(), "base");
        assert_eq!(pipeline.jobs[1].script, ["base"]);
    }

    #[test]
    fn inputs_fill_a_file_s_holes_by_their_types() {
        let component = "
spec:
  inputs:
    job: {description: its name}
    stage: {default: test, options: [test, deploy]}
    count: {type: number, default: 2}
    loud: {type: boolean, default: false}
    lines: {type: array, default: [one, two]}
    version: {regex: /^v\\d+$/, default: v1}
---
'$[[ inputs.job ]]':
  stage: $[[ inputs.stage ]]
  parallel: $[[ inputs.count ]]
  allow_failure: $[[ inputs.loud ]]
  script: $[[ inputs.lines ]]
  variables:
    V: 'is $[[ inputs.version | truncate(1, 5) ]]!'
    W: '$[[ inputs.job | expand_vars ]]'
";
        let main = |inputs: &str| format!("include: {{local: c.yml, inputs: {inputs}}}\n");
        let pipeline = loaded(&[
            (".gitlab-ci.yml", &main("{job: on-$CI_COMMIT_BRANCH, count: 3, loud: true}")),
            ("c.yml", component),
        ])
        .unwrap();
        assert_eq!(pipeline.jobs.len(), 3);
        let job = &pipeline.jobs[0];
        assert_eq!((job.name.as_str(), job.stage.as_str()), ("on-$CI_COMMIT_BRANCH 1/3", "test"));
        assert_eq!(job.script, ["one", "two"]);
        assert_eq!(job.allow_failure, AllowFailure::Always);
        assert_eq!(value(&pipeline, &job.name, "V").unwrap(), "is 1!");
        assert_eq!(value(&pipeline, &job.name, "W").unwrap(), "on-main");
        for (inputs, says) in [
            ("{}", "input `job` has no value and no default"),
            ("{job: a, stage: build}", "is `build`, which is none of test, deploy"),
            ("{job: a, count: many}", "takes a number, not text"),
            ("{job: a, version: 2x}", "does not fit the regular expression"),
            ("{job: a, other: 1}", "input `other` is not declared"),
        ] {
            let error =
                loaded(&[(".gitlab-ci.yml", &main(inputs)), ("c.yml", component)]).unwrap_err();
            assert!(error.contains(says), "{inputs}: {error}");
        }
        let given = LoadOptions {
            inputs: vec![("job".into(), "mine".into()), ("count".into(), "1".into())],
            ..pushed()
        };
        assert_eq!(with(component, &given).jobs[0].name, "mine 1/1");
    }

    #[test]
    fn what_cannot_be_included_is_named_where_it_stands() {
        let file = "include:\n  - missing.yml\n  - ../out.yml\n  - notes.txt\n  - circle.yml\n  - broken.yml\n  - https://example.org/x.yml\n  - {template: T.yml}\n  - {project: a/b, file: c.yml}\n  - {component: host/a/b@1}\n  - {local: plain.yml, inputs: {x: 1}}\na: {script: x}\n";
        let error = loaded(&[
            (".gitlab-ci.yml", file),
            ("circle.yml", "include: circle.yml\n"),
            ("broken.yml", "ok: {script: x}\nb:\n  scriptt: x\n  - y\n"),
            ("plain.yml", "p: {script: x}\n"),
        ])
        .unwrap_err();
        insta::assert_snapshot!(error, @r"
        10 problems in the pipeline
          DIR/.gitlab-ci.yml:2: cannot include `missing.yml`: No such file or directory (os error 2)
          DIR/.gitlab-ci.yml:3: `include: local` (`../out.yml`) leads out of the project
          DIR/.gitlab-ci.yml:4: `include: local` (`notes.txt`) ends in neither .yml nor .yaml
          DIR/.gitlab-ci.yml:7: `include: remote` (`https://example.org/x.yml`), which is on another server, is not supported, unless --ignore-unknown
          DIR/.gitlab-ci.yml:8: `include: template` (`T.yml`), which is part of GitLab, is not supported, unless --ignore-unknown
          DIR/.gitlab-ci.yml:9: `include: project` (`a/b`), which is in another project, is not supported, unless --ignore-unknown
          DIR/.gitlab-ci.yml:10: `include: component` (`host/a/b@1`), which is in GitLab's catalogue, is not supported, unless --ignore-unknown
          DIR/.gitlab-ci.yml:11: input `x` is given to a file that declares no inputs
          DIR/circle.yml:1: `include` goes round in a circle: circle.yml → circle.yml
          DIR/broken.yml:4: not valid YAML: while parsing a block mapping, did not find expected key
        ");
    }

    #[test]
    fn a_link_may_not_lead_out_of_the_project() {
        let (guard, options) = folder(&[
            ("project/.gitlab-ci.yml", "include: l.yml\na: {script: x}\n"),
            ("secret.yml", "s: {script: x}\n"),
        ]);
        let root = options.project.root.join("project");
        std::os::unix::fs::symlink("../secret.yml", root.join("l.yml")).unwrap();
        let options =
            LoadOptions { project: Project { root: root.clone(), ..options.project }, ..pushed() };
        let error = load(&root.join(".gitlab-ci.yml"), &options).unwrap_err().to_string();
        assert!(error.contains("it leads out of the project"), "{error}");
        drop(guard);
    }

    #[test]
    fn what_an_ignored_include_would_have_brought_is_left_out_and_named() {
        let options = LoadOptions { ignore_unknown: true, ..pushed() };
        let pipeline = with(
            "include: {template: T.yml}\na: {extends: .theirs}\nb: {variables: {X: y}}\nc: {script: x, needs: [theirs]}\nd: {script: x, dependencies: [a]}\n",
            &options,
        );
        let names: Vec<_> = pipeline.jobs.iter().map(|job| job.name.as_str()).collect();
        assert_eq!(names, ["c", "d"]);
        insta::assert_snapshot!(pipeline.notes.join("\n"), @r"
        ci.yml:1: `include: template` (`T.yml`), which is part of GitLab, is not supported and ignored
        ci.yml:2: job `a`: extends `.theirs`, which does not exist: left out, for want of an ignored include
        ci.yml:3: job `b`: has no `script`: left out, for want of an ignored include
        ci.yml:4: job `c`: needs `theirs`, which is no job of this pipeline: left out, for want of an ignored include
        ci.yml:5: job `d`: depends on `a`, which is no job of this pipeline: left out, for want of an ignored include
        ");
    }
}

mod public {
    use super::*;

    /// Pipelines built like those of public projects: each file says which one it follows.
    fn outlines() -> Vec<Utf8PathBuf> {
        let folder =
            Utf8Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pipelines/public");
        let mut paths: Vec<Utf8PathBuf> =
            folder.read_dir_utf8().unwrap().map(|entry| entry.unwrap().path().to_owned()).collect();
        paths.sort();
        paths
    }

    #[test]
    fn pipelines_built_like_ten_public_ones_leave_nothing_unexplained() {
        let outlines = outlines();
        assert_eq!(outlines.len(), 10);
        let mut all = String::new();
        for path in outlines {
            let options = LoadOptions { ignore_unknown: true, ..pushed() };
            let text = fs::read_to_string(&path).unwrap();
            let name = path.file_name().unwrap();
            let pipeline = parse(&text, name, &options).unwrap_or_else(|error| panic!("{error}"));
            writeln!(all, "== {name}\n{}{}\n", told(&pipeline), pipeline.notes.join("\n")).unwrap();
        }
        insta::with_settings!({snapshot_path => "snapshots", prepend_module_to_snapshot => false}, {
            insta::assert_snapshot!("public", all);
        });
    }
}
