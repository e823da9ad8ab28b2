//! Expressions and what comes of them.

use std::collections::BTreeMap;

use super::*;

fn job() -> Value {
    let inputs = [
        ("name", serde_json::json!("fred"), false),
        ("password", serde_json::json!("123456"), true),
        ("age", serde_json::json!(1), false),
        ("ratio", serde_json::json!(0.5), false),
        ("big", serde_json::json!(12_345_678), false),
        ("minus", serde_json::json!(-0.0), false),
        ("likes", serde_json::json!(false), false),
        ("friends", serde_json::json!(["bob", "sal\"ly"]), false),
        (
            "address",
            serde_json::json!({"line1": "42 Wallaby Way", "deep": {"list": [1, [2]]}}),
            false,
        ),
        ("dash-ed", serde_json::json!("dash"), false),
        ("type", serde_json::json!("a reserved word"), false),
        ("template", serde_json::json!("${{ job.inputs.name }}"), false),
        ("keys", serde_json::json!([{"secret": 1}]), true),
    ];
    let inputs = inputs
        .into_iter()
        .map(|(name, json, sensitive)| (name.to_owned(), Value::of_json(&json, sensitive)))
        .collect();
    Value::object(BTreeMap::from([("inputs".to_owned(), Value::object(inputs))]))
}

fn filled(text: &str) -> Result<Filled, String> {
    fill(text, &job(), &Cell::new(1_000_000)).map_err(|error| error.to_string())
}

fn text(template: &str) -> String {
    let filled = filled(template).unwrap_or_else(|error| panic!("{template}: {error}"));
    assert!(!filled.sensitive, "{template}");
    filled.text
}

#[test]
fn templates_keep_what_is_around_their_expressions() {
    for (template, expected) in [
        ("", ""),
        ("plain $ ${ $${ {{ }} \\ \\n", "plain $ ${ $${ {{ }} \\ \\n"),
        ("Hello ${{ job.inputs.name }}!", "Hello fred!"),
        ("${{job.inputs.name}}${{ job.inputs.age }}", "fred1"),
        ("${{\n  job . inputs\t. name\n}}", "fred"),
        ("$${{ job.inputs.name }}}}", "$fred}}"),
        ("\\${{ job.inputs.name }}", "${{ job.inputs.name }}"),
        ("\\\\${{ x }}", "\\${{ x }}"),
        ("\\${{ a }} ${{ job.inputs.name }}", "${{ a }} fred"),
        ("é ${{ job.inputs.name }} é", "é fred é"),
        ("${{ job.inputs.template }}", "${{ job.inputs.name }}"),
    ] {
        assert_eq!(text(template), expected, "{template}");
    }
}

#[test]
fn expressions_have_the_values_that_the_language_gives_them() {
    for (expression, expected) in [
        ("job.inputs.age", "1"),
        ("job.inputs.ratio", "0.5"),
        ("job.inputs.big", "12345678"),
        ("job.inputs.minus", "0"),
        ("job.inputs.likes", "false"),
        ("job.inputs.friends", "[\"bob\",\"sal\\\"ly\"]"),
        ("job.inputs.friends[1]", "sal\"ly"),
        ("job.inputs.friends[2 - 2]", "bob"),
        ("job.inputs.address.line1", "42 Wallaby Way"),
        ("job.inputs[\"address\"]['deep'].list[1][0]", "2"),
        ("job.inputs.address.deep", "{\"list\":[1,[2]]}"),
        ("job.inputs[\"dash-ed\"]", "dash"),
        ("job.inputs.type", "a reserved word"),
        ("null", "<null>"),
        ("[null]", "[null]"),
        ("true", "true"),
        ("42", "42"),
        ("3.14", "3.14"),
        ("1.5e3", "1500"),
        ("2E-4", "0.0002"),
        ("007", "7"),
        ("'it\\'s \\\\ \\n ${{ not }}'", "it's \\ \\n ${{ not }}"),
        (r#""a\n\t\"\\\/\u00e9\${{ x }}""#, "a\n\t\"\\/é${{ x }}"),
        (r#""<${{ job.inputs.name }}>${{ "}}" }}""#, "<fred>}}"),
        ("2 + 3 * 4", "14"),
        ("(2 + 3) * 4", "20"),
        ("10 - 4 - 3", "3"),
        ("7 / 2", "3.5"),
        ("10 % 3", "1"),
        ("-10 % 3", "-1"),
        ("--5", "5"),
        ("-job.inputs.age", "-1"),
        ("!+0", "true"),
        ("'a' + \"b\" + job.inputs.name", "abfred"),
        ("1 == 1.0", "true"),
        ("1 == '1'", "false"),
        ("1 != '1'", "true"),
        ("1 < 2 && 2 <= 2 && 3 > 2 && 3 >= 3", "true"),
        ("'B' < 'a'", "true"),
        ("false < true", "true"),
        ("null < false && true < 0 && 9 < '' && 'z' < [] && [9] < {}", "true"),
        ("[1, 2] < [1, 2, 3] && [1, 3] > [1, 2, 3]", "true"),
        ("{a: 1} < {a: 1, b: 2} && {b: 1} > {a: 2} && {a: 2} > {a: 1}", "true"),
        ("{a: 1, 'b': [2,],} == {\"b\": [2], a: 1}", "true"),
        ("{(job.inputs.name): 1}", "{\"fred\":1}"),
        ("job.inputs.name == 'fred' && 'yes' || 'no'", "yes"),
        ("job.inputs.likes && '--likes' || ''", ""),
        ("job.inputs.nobody || 'nobody'", "nobody"),
        ("job.inputs.friends[7] || job.inputs.nobody || 'last'", "last"),
        ("'first' || 1 / 0", "first"),
        ("'' && 1 / 0", ""),
        ("str(42) + str(true) + str(null)", "42true<null>"),
        ("str([1, 'a'])", "[1,\"a\"]"),
        ("num('3.25') + num(1)", "4.25"),
        ("num(' -2e1 ')", "-20"),
        ("bool('x') && !bool('') && !bool(0) && bool([0]) && !bool({}) && bool(str)", "true"),
        ("({'hello': [1 + 10]})['hello'][0]", "11"),
        ("{}", "{}"),
    ] {
        assert_eq!(text(&format!("${{{{ {expression} }}}}")), expected, "{expression}");
    }
}

#[test]
fn what_has_no_value_is_explained() {
    for (template, part) in [
        ("${{", "expected an expression, but the text ends in `${{ `"),
        ("${{ }}", "expected an expression, found '}' in `${{ }}`"),
        ("a ${{ job.inputs.name", "expected `}}`, but the text ends in `${{ job.inputs.name`"),
        ("${{ job.inputs.name }", "expected `}}`, found '}'"),
        (
            "${{ job.inputs.name + }} b",
            "expected an expression, found '}' in `${{ job.inputs.name + }}`",
        ),
        ("${{ job.inputs.name name }}", "expected `}}`, found 'n'"),
        ("${{ job.inputs. }}", "expected a name, found '}'"),
        ("${{ job.inputs[ }}", "expected an expression, found '}'"),
        ("${{ job.inputs['name' }}", "expected `]`, found '}'"),
        ("${{ (1 }}", "expected `)`"),
        ("${{ [1 2] }}", "expected `]`"),
        ("${{ {a 1} }}", "expected `:`"),
        ("${{ 'abc }}", "a string is not closed"),
        ("${{ \"abc\\", "a string is not closed"),
        ("${{ \"\\q\" }}", "`\\q` means nothing"),
        ("${{ \"\\ud800\" }}", "needs four digits"),
        ("${{ \"${{ \" }}", "a string is not closed"),
        ("${{ a = b }}", "expected `}}`, found '='"),
        ("${{ 1 & 2 }}", "expected `}}`, found '&'"),
        ("${{ § }}", "expected an expression, found '§'"),
        ("${{ while }}", "`while` is a reserved word"),
        ("${{ vars.CI }}", "`vars` is not known here, only `job.inputs` is, in `${{ vars.CI }}`"),
        ("${{ job.inputs.nobody }}", "`job.inputs.nobody` does not exist"),
        ("${{ job.input.name }}", "`job.input` does not exist"),
        ("${{ job.inputs.friends[2] }}", "`job.inputs.friends[2]` does not exist"),
        ("${{ job.inputs.friends[-1] }}", "does not exist"),
        ("${{ job.inputs.friends[0.5] }}", "does not exist"),
        ("${{ job.inputs.friends['0'] }}", "an array cannot be asked for by a string"),
        ("${{ job.inputs.address[0] }}", "an object cannot be asked for by a number"),
        ("${{ job.inputs.age.years }}", "a number has no members"),
        ("${{ null.a || 1 }}", "null has no members"),
        ("${{ 'a' + 1 }}", "`+` cannot take a string and a number"),
        ("${{ 'a' * 'b' }}", "`*` cannot take a string and a string"),
        ("${{ -'a' }}", "`-` cannot take a string"),
        ("${{ 1 / 0 }}", "a division by zero"),
        ("${{ 1 % (1 - 1) }}", "a division by zero"),
        ("${{ 1e308 * 10 }}", "too large"),
        ("${{ 1e999 }}", "too large"),
        ("${{ num('abc') }}", "`num('abc')` is given no number"),
        ("${{ num('inf') }}", "is given no number"),
        ("${{ num(true) }}", "is given no number"),
        ("${{ str() }}", "`str()` needs one argument"),
        ("${{ job.inputs.name() }}", "calls a string"),
        ("${{ str }}", "a function has no text form"),
        ("${{ {1: 2} }}", "a number cannot be a key"),
    ] {
        let Err(error) = filled(template) else { panic!("{template}") };
        assert!(error.contains(part), "{template}: {error}");
    }
}

#[test]
fn complaints_stay_short_and_on_one_line() {
    let long = format!("${{{{ job.inputs.nobody + 'x\n\u{1b}[2J{}' }}}}", "y".repeat(10_000));
    let error = filled(&long).err().unwrap();
    assert!(error.len() < 300 && !error.contains(['\n', '\u{1b}']), "{error}");
    assert!(error.ends_with("…`"), "{error}");
}

#[test]
fn what_is_sensitive_marks_all_that_is_made_of_it() {
    for expression in [
        "job.inputs.password",
        "'a' + job.inputs.password",
        "\"a ${{ job.inputs.password }}\"",
        "str(job.inputs.password)",
        "[1, [job.inputs.password]]",
        "{a: job.inputs.password}",
        "{(job.inputs.password): 1}",
        "job.inputs.password == 'guess'",
        "job.inputs.password && 'set'",
        "!job.inputs.password",
        "bool(job.inputs.password)",
        "num(job.inputs.password) + 1",
        "job.inputs.keys[0].secret",
        "str(job.inputs)",
        "job.inputs",
        "['a'][num(job.inputs.password) - 123456]",
    ] {
        assert!(filled(&format!("${{{{ {expression} }}}}")).unwrap().sensitive, "{expression}");
    }
    assert!(!filled("${{ [job.inputs.password, 'a'][1] }}").unwrap().sensitive);
}

#[test]
fn neither_depth_nor_length_is_without_end() {
    let deep = format!("${{{{ {}1 }}}}", "-".repeat(100_000));
    assert!(filled(&deep).err().unwrap().contains("too deeply"));
    let deep = format!("${{{{ {} }}}}", "[".repeat(100_000));
    assert!(filled(&deep).err().unwrap().contains("too deeply"));
    let deep = format!("${{{{ {} }}}}", "\"${{ ".repeat(100_000));
    assert!(filled(&deep).err().unwrap().contains("too deeply"));
    let wide = format!("${{{{ 0{} }}}}", " + 1".repeat(100_000));
    assert_eq!(text(&wide), "100000");
    let long = "${{ job.inputs.name }}".repeat(1000);
    let room = Cell::new(4999);
    assert!(fill(&long, &job(), &room).err().unwrap().to_string().contains("too long"));
    assert!(fill(&long, &job(), &Cell::new(5000)).is_ok());
}
