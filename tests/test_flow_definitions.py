"""Laws of flow definitions: each mistake is told where it stands, whole flows pass, nothing that is written crashes."""

from __future__ import annotations

import copy
import io
import itertools
import json
import socket
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trigger_daemon import cli
from trigger_daemon.cli import flow
from trigger_daemon.globus import judging
from trigger_daemon.globus.definition import (
    BYTES_MAX,
    DEPTH_MAX,
    EXPRESSION_MAX,
    FAULTS_MAX,
    INPUT_BYTES_MAX,
    DefinitionFault,
    faults,
    input_faults,
    json_path,
    schema_faults,
    unfed,
)
from trigger_daemon.globus.judging import judge_input

TRANSFER = "https://transfer.actions.globus.org/transfer"
UUID = "aaaaaaaa-0000-4000-8000-000000000001"

# ------------------------------------------------------------------------ whole flows

BEAMTIME = {
    "Comment": "Raw movies to the cluster, analysis there, finals to the archive, open to the visit, in the index",
    "StartAt": "MoveRaw",
    "States": {
        "MoveRaw": {
            "Type": "Action", "ActionUrl": TRANSFER, "WaitTime": 172_800, "ResultPath": "$.raw", "Next": "Analyse",
            "Parameters": {
                "source_endpoint.$": "$.microscope.id", "destination_endpoint.$": "$.cluster.id",
                "label.=": "'raw ' + batch.token", "verify_checksum": True, "sync_level": 3,
                "DATA": [{"source_path.=": "microscope.path + '/'", "destination_path.$": "$.cluster.path",
                          "recursive": True}],
            },
            "Catch": [{
                "ErrorEquals": ["ActionTimeout", "ActionFailedException"], "ResultPath": "$.why", "Next": "Lost",
            }],
        },
        "Analyse": {
            "Type": "Action", "ActionUrl": "https://compute.actions.globus.org/v3", "WaitTime": 86_400,
            "RunAs": "Flow", "ResultPath": "$.analysis", "Next": "Describe",
            "Parameters": {
                "endpoint_id.$": "$.compute.endpoint", "__Private_Parameters": ["tasks"],
                "tasks": [{"function_id.$": "$.compute.function", "kwargs": {"manifest.$": "$.batch.manifest"}}],
            },
            "Catch": [{"ErrorEquals": ["States.ALL"], "ResultPath": "$.why", "Next": "Lost"}],
        },
        "Describe": {
            "Type": "ExpressionEval", "ResultPath": "$.entry", "Next": "WorthIt",
            "Parameters": {
                "subject.=": "'globus://' + archive.id + archive.path.rstrip('/') + '/' + pathsplit(batch.manifest)[1]",
                "files.=": "len(`$.analysis.details.results[0].output`['files'])",
                "movies.=": "[one['name'] for one in analysis.details.results[0].output['files'] if 'eer' in one.name]",
                "operator.=": "getattr('visit.operator', 'nobody') if is_present('visit') else str(None)",
                "tail.=": "batch.token.split('-')[-1]",
                "when.$": "$._context.run_id",
            },
        },
        "WorthIt": {
            "Type": "Choice", "Default": "MoveFinals",
            "Choices": [
                {"And": [
                    {"Variable": "$.entry.files", "NumericLessThan": 1},
                    {"Not": {"Or": [
                        {"Variable": "$.batch.closed", "TimestampLessThan": "2026-11-25T02:08:00Z"},
                        {"Variable": "$.batch.rule", "StringEqualsPath": "$.batch.kept"},
                    ]}},
                ], "Next": "Nothing"},
            ],
        },
        "MoveFinals": {
            "Type": "Action", "WaitTime": 172_800, "ResultPath": "$.finals", "Next": "Share",
            "Handler": {"Type": "ActionProvider", "Url": TRANSFER},
            "Parameters": {
                "source_endpoint.$": "$.cluster.id", "destination_endpoint.$": "$.archive.id", "verify_checksum": True,
                "DATA.=": "[{'source_path': a, 'destination_path': archive.path + '/' + a} for a in entry.movies]",
            },
        },
        "Share": {
            "Type": "Action", "ActionUrl": "https://transfer.actions.globus.org/manage_permission/",
            "ExceptionOnActionFailure": False, "ResultPath": "$.shared", "Next": "Index",
            "Parameters": {
                "operation": "CREATE", "endpoint_id.$": "$.archive.id", "path.$": "$.archive.path", "permissions": "r",
                "principal_type": "group", "principal.$": "$.visit.group",
            },
        },
        "Index": {
            "Type": "Action", "ActionUrl": "https://actions.globus.org/search/ingest", "WaitTime": 3_600,
            "ResultPath": "$.indexed", "End": True,
            "Parameters": {
                "search_index.$": "$.visit.index", "subject.$": "$.entry.subject", "content.$": "$.entry",
                "visible_to.=": "['urn:globus:groups:id:' + visit.group]",
            },
        },
        "Nothing": {"Type": "Pass", "Result": {"finals": 0}, "ResultPath": "$.outcome", "End": True},
        "Lost": {"Type": "Fail", "Error": "Lost", "CausePath": "$.why.Cause"},
    },
}  # fmt: skip

POLLING = {
    "StartAt": "Zero",
    "States": {
        "Zero": {"Type": "ExpressionEval", "Parameters": {"n": 0}, "ResultPath": "$.loop", "Next": "Look"},
        "Look": {
            "Type": "Action", "ActionUrl": "https://transfer.actions.globus.org/stat", "ResultPath": "$.seen",
            "Parameters": {"endpoint_id.$": "$.collection", "path.=": "folder + '/done'"}, "Next": "There",
        },
        "There": {
            "Type": "Choice", "Default": "Sleep",
            "Choices": [
                {"Variable": "$.seen.details.type", "IsPresent": True, "Next": "Ask"},
                {"Variable": "$.loop.n", "NumericGreaterThanEquals": 30, "Next": "Late"},
            ],
        },
        "Sleep": {"Type": "Wait", "Seconds": 120, "Next": "Count"},
        "Count": {
            "Type": "ExpressionEval", "Parameters": {"n.=": "loop.n + 1"}, "ResultPath": "$.loop", "Next": "Look",
        },
        "Ask": {
            "Type": "CreateWebInput", "ResultPath": "$.asked", "Next": "Answer",
            "Parameters": {
                "InputType": "Selection", "Context": {"title": "Keep it?"}, "RespondentUrns.$": "$.people",
                "Options": [{"Value": "yes", "Label": "Keep", "Description": ""}, {"Value": "no", "Label": "Drop"}],
            },
        },
        "Answer": {
            "Type": "AwaitWebInput", "Parameters": {"web_input_id.$": "$.asked.web_input_id"}, "ResultPath": "$.answer",
            "End": True, "Catch": [{"ErrorEquals": ["Flows.WebInputExpired"], "ResultPath": "$.why", "Next": "Late"}],
        },
        "Late": {"Type": "Fail", "Error": "Late"},
    },
}  # fmt: skip


@pytest.mark.parametrize("definition", [BEAMTIME, POLLING], ids=["beamtime", "polling"])
def test_whole_flows_have_no_fault(definition):
    """A flow as sites write them raises neither an error nor a warning."""
    assert faults(definition) == []


@pytest.mark.parametrize("definition", [BEAMTIME, POLLING], ids=["beamtime", "polling"])
def test_a_check_changes_nothing(definition):
    """What is checked stays as it was."""
    before = copy.deepcopy(definition)
    faults(definition)

    assert definition == before


# ------------------------------------------------------------------ one mistake at a time


def flow_of(state: object, **others: object) -> dict:
    """Return a definition that starts with `X`."""
    return {"StartAt": "X", "States": {"X": state, **others}}


def ended(kind: str = "Pass", **keys: object) -> dict:
    return {"Type": kind, "End": True, **keys}


def action(**keys: object) -> dict:
    return {"Type": "Action", "ActionUrl": "https://example.org/act", "ResultPath": "$.r", "End": True, **keys}


def with_parameters(**parameters: object) -> dict:
    return flow_of(ended(Parameters=parameters, ResultPath="$.r"))


def expression(text: object) -> dict:
    return flow_of(ended(Parameters={"a.=": text}, ResultPath="$.r"))


def choice(*rules: object, **keys: object) -> dict:
    return flow_of({"Type": "Choice", "Choices": list(rules), "Default": "E", **keys}, E=ended())


def provider(url: str, **parameters: object) -> dict:
    return flow_of(action(ActionUrl=url, WaitTime=90_000, Parameters=parameters))


EXPRESSION, PATH = ('$.States.X.Parameters["a.="]', '$.States.X.Parameters["a.$"]')
RULE, CATCHER = "$.States.X.Choices[0]", "$.States.X.Catch[0]"
REPLACES = {"Type": "Action", "ActionUrl": "https://e.org/a"}  # the whole state, as it has no ResultPath
PERMISSION = "https://transfer.actions.globus.org/manage_permission"
ITEM = {"source_path": "/a", "destination_path": "/b"}
SENT = {"source_endpoint": UUID, "destination_endpoint": UUID, "DATA": [ITEM]}

# definition, path, words of the message, words of the hint
ERRORS = {
    "no object": ([], "$", "must be an object", ""),
    "unknown top key": ({**flow_of(ended()), "Startat": "X"}, "$.Startat", "no `Startat`", "`StartAt`"),
    "version": ({**flow_of(ended()), "Version": "1"}, "$.Version", "no `Version`", "leave it out"),
    "wrapped": ({"definition": {}, **flow_of(ended())}, "$.definition", "no `definition`", "under its `definition`"),
    "comment": ({**flow_of(ended()), "Comment": 1}, "$.Comment", "must be a text", ""),
    "no states": ({"StartAt": "X"}, "$", "`States` is missing", ""),
    "states a list": ({"StartAt": "X", "States": []}, "$.States", "must be an object", ""),
    "states empty": ({"StartAt": "X", "States": {}}, "$.States", "no state", ""),
    "no start": ({"States": {"X": ended()}}, "$", "`StartAt` is missing", '"StartAt": "X"'),
    "start no text": ({"StartAt": 1, "States": {"X": ended()}}, "$.StartAt", "must be a text", ""),
    "start absent": ({"StartAt": "Deliv", "States": {"Deliver": ended()}}, "$.StartAt", "no state", "`Deliver`"),
    "name empty": ({"StartAt": "X", "States": {"X": ended(), "": ended()}}, '$.States[""]', "1 to 128", ""),
    "name long": (
        {"StartAt": "n" * 129, "States": {"n" * 129: ended()}}, f"$.States.{'n' * 129}", "1 to 128", "rename"
    ),
    "state no object": (flow_of("end"), "$.States.X", "must be an object", ""),
    "state comment": (flow_of(ended(Comment=[])), "$.States.X.Comment", "must be a text", ""),
    "no type": (flow_of({"End": True}), "$.States.X", "`Type` is missing", "Action"),
    "type unknown": (flow_of(ended("action")), "$.States.X.Type", "no type `action`", "`Action`"),
    "type task": (flow_of(ended("Task")), "$.States.X.Type", "no type `Task`", "Action"),
    "type succeed": (flow_of({"Type": "Succeed"}), "$.States.X.Type", "no type", "End"),
    "type parallel": (flow_of(ended("Parallel")), "$.States.X.Type", "no type", "side by side"),
    "type map": (flow_of(ended("Map")), "$.States.X.Type", "no type", "Choice"),
    "type no text": (flow_of({"Type": {}, "End": True}), "$.States.X.Type", "no type an object", ""),
    "retry": (flow_of(action(Retry=[])), "$.States.X.Retry", "no `Retry`", "catch"),
    "output path": (flow_of(ended(OutputPath="$.a")), "$.States.X.OutputPath", "no `OutputPath`", "`ResultPath`"),
    "key misspelt": (flow_of(action(Waittime=5)), "$.States.X.Waittime", "no `Waittime`", "`WaitTime`"),
    "key of others": (flow_of(ended("Wait", Seconds=1, Catch=[])), "$.States.X.Catch", "Wait state has no `Catch`", ""),
    "next and end": (flow_of(ended(Next="E"), E=ended()), "$.States.X.End", "exclude", "keep one"),
    "no way on": (flow_of({"Type": "Pass"}), "$.States.X", "neither `Next` nor `End`", "End"),
    "end false": (flow_of({"Type": "Pass", "End": False}), "$.States.X.End", "must be true", ""),
    "next absent": (flow_of({"Type": "Pass", "Next": "Endd"}, End=ended()), "$.States.X.Next", "no state", "`End`"),
    "next no text": (flow_of({"Type": "Pass", "Next": 3}), "$.States.X.Next", "name of a state", ""),
    "default absent": (
        choice({"Variable": "$.a", "IsNull": True, "Next": "E"}, Default="F"), "$.States.X.Default", "no state `F`", "E"
    ),
    "choice next absent": (
        choice({"Variable": "$.a", "IsNull": True, "Next": "F"}), RULE + ".Next", "no state `F`", "E"
    ),
    "catch next absent": (
        flow_of(action(Catch=[{"ErrorEquals": ["States.ALL"], "Next": "F"}])), CATCHER + ".Next", "no state", ""
    ),
    "unreachable": (flow_of(ended(), Y=ended()), "$.States.Y", "nothing leads to `Y`", "remove it"),
    "endless": (
        flow_of({"Type": "Pass", "Next": "Y"}, Y={"Type": "Wait", "Seconds": 1, "Next": "X"}), "$.States.X",
        "no end can be reached (nor from `Y`)", "Choice",
    ),
    "parameters and input": (
        flow_of(action(Parameters={}, InputPath="$.a")), "$.States.X.InputPath", "exclude", "keep one"
    ),
    "parameters no object": (flow_of(action(Parameters=[])), "$.States.X.Parameters", "must be an object", ""),
    "eval without parameters": (flow_of(ended("ExpressionEval", ResultPath="$.a")), "$.States.X", "`Parameters`", ""),
    "eval without place": (flow_of(ended("ExpressionEval", Parameters={})), "$.States.X", "`ResultPath`", ""),
    "eval with input": (
        flow_of(ended("ExpressionEval", Parameters={}, ResultPath="$.a", InputPath="$.b")), "$.States.X.InputPath",
        "no `InputPath`", "Pass",
    ),
    "result no object": (flow_of(ended(Result=1)), "$.States.X.Result", "must be an object", ""),
    "no url": (flow_of({"Type": "Action", "End": True}), "$.States.X", "neither `ActionUrl` nor", "https"),
    "url and handler": (
        flow_of(action(Handler={"Type": "RegisteredAPI", "Id": "i"})), "$.States.X.Handler", "exclude", "keep one"
    ),
    "http": (flow_of(action(ActionUrl="http://e.org/a")), "$.States.X.ActionUrl", "https address", "https://e.org/a"),
    "url broken": (flow_of(action(ActionUrl="https://[::1")), "$.States.X.ActionUrl", "https address", ""),
    "url with a blank": (flow_of(action(ActionUrl="https://e.org/a b")), "$.States.X.ActionUrl", "https address", ""),
    "url no text": (flow_of(action(ActionUrl=None)), "$.States.X.ActionUrl", "must be a text", ""),
    "retired": (
        provider("https://actions.globus.org/transfer/transfer"), "$.States.X.ActionUrl", "2025-01-22", TRANSFER
    ),
    "retired, older": (
        provider("https://actions.automate.globus.org/transfer/set_permission/"), "$.States.X.ActionUrl", "retired",
        "https://transfer.actions.globus.org/manage_permission",
    ),
    "handler no object": (
        flow_of({"Type": "Action", "Handler": "h", "End": True}), "$.States.X.Handler", "must be an object", ""
    ),
    "handler type": (
        flow_of({"Type": "Action", "Handler": {"Type": "API"}, "End": True}), "$.States.X.Handler.Type", "no type",
        "RegisteredAPI",
    ),
    "handler without type": (
        flow_of({"Type": "Action", "Handler": {}, "End": True}), "$.States.X.Handler", "`Type` is missing", ""
    ),
    "handler without url": (
        flow_of({"Type": "Action", "Handler": {"Type": "ActionProvider"}, "End": True}), "$.States.X.Handler", "`Url`",
        "",
    ),
    "handler http": (
        flow_of({"Type": "Action", "Handler": {"Type": "ActionProvider", "Url": "http://e.org"}, "End": True}),
        "$.States.X.Handler.Url", "https address", "",
    ),
    "handler key": (
        flow_of({"Type": "Action", "Handler": {"Type": "RegisteredAPI", "Id": "i", "Url": "u"}, "End": True}),
        "$.States.X.Handler.Url", "no `Url`", "",
    ),
    "wait time": (flow_of(action(WaitTime="1h")), "$.States.X.WaitTime", "number of seconds", "172800"),
    "wait time none": (flow_of(action(WaitTime=0)), "$.States.X.WaitTime", "number of seconds", ""),
    "run as": (flow_of(action(RunAs="")), "$.States.X.RunAs", "must be a text", ""),
    "exception": (
        flow_of(action(ExceptionOnActionFailure="no")), "$.States.X.ExceptionOnActionFailure", "true or false", ""
    ),
    "result path": (flow_of(action(ResultPath="delivered")), "$.States.X.ResultPath", "`$.`", "`$.delivered`"),
    "result path null": (flow_of(action(ResultPath=None)), "$.States.X.ResultPath", "must be a text", ""),
    "result path several": (flow_of(action(ResultPath="$.a[*]")), "$.States.X.ResultPath", "several values", ""),
    "input path": (flow_of(ended(InputPath=["$"])), "$.States.X.InputPath", "must be a text", ""),
    "wait without": (flow_of(ended("Wait")), "$.States.X", "how long", "`Seconds`"),
    "wait twice": (
        flow_of(ended("Wait", Seconds=1, Timestamp="2026-01-01T00:00:00Z")), "$.States.X.Timestamp", "exclude", ""
    ),
    "wait text": (flow_of(ended("Wait", Seconds="60")), "$.States.X.Seconds", "whole number", ""),
    "wait true": (flow_of(ended("Wait", Seconds=True)), "$.States.X.Seconds", "whole number, not `true`", ""),
    "wait negative": (flow_of(ended("Wait", Seconds=-1)), "$.States.X.Seconds", "whole number", ""),
    "wait path": (flow_of(ended("Wait", SecondsPath="$.a[*]")), "$.States.X.SecondsPath", "several values", ""),
    "wait until": (flow_of(ended("Wait", Timestamp="2026-01-01")), "$.States.X.Timestamp", "no time", "zone"),
    "wait, no day": (flow_of(ended("Wait", Timestamp="2026-02-30T00:00:00Z")), "$.States.X.Timestamp", "no time", ""),
    "fail goes on": (flow_of({"Type": "Fail", "End": True}), "$.States.X.End", "no `End`", "ends the run"),
    "fail twice": (
        flow_of({"Type": "Fail", "Error": "a", "ErrorPath": "$.b"}), "$.States.X.ErrorPath", "exclude", "keep one"
    ),
    "fail cause": (flow_of({"Type": "Fail", "Cause": 1}), "$.States.X.Cause", "must be a text", ""),
    "no choices": (flow_of({"Type": "Choice", "Default": "E"}, E=ended()), "$.States.X", "must have `Choices`", ""),
    "choices empty": (choice(), "$.States.X.Choices", "not empty", ""),
    "choice has next": (
        choice({"Variable": "$.a", "IsNull": True, "Next": "E"}, Next="E"), "$.States.X.Next", "no `Next`", "its own"
    ),
    "rule no object": (choice("$.a"), RULE, "must be an object", ""),
    "rule without next": (choice({"Variable": "$.a", "IsNull": True}), RULE, "must have `Next`", ""),
    "rule without operator": (choice({"Variable": "$.a", "Next": "E"}), RULE, "without an operator", ""),
    "rule without variable": (choice({"IsNull": True, "Next": "E"}), RULE, "`Variable` is missing", ""),
    "operator misspelt": (
        choice({"Variable": "$.a", "StringEqual": "b", "Next": "E"}), RULE + ".StringEqual",
        "no `StringEqual`", "`StringEquals`",
    ),
    "two operators": (
        choice({"Variable": "$.a", "IsNull": True, "IsString": True, "Next": "E"}), RULE + ".IsString",
        "one thing", "And",
    ),
    "inner next": (
        choice({"Not": {"Variable": "$.a", "IsNull": True, "Next": "E"}, "Next": "E"}),
        RULE + ".Not.Next", "no `Next`", "outermost",
    ),
    "and empty": (choice({"And": [], "Next": "E"}), RULE + ".And", "list of rules, not empty", ""),
    "or no list": (choice({"Or": {}, "Next": "E"}), RULE + ".Or", "list of rules", ""),
    "not a list": (choice({"Not": [], "Next": "E"}), RULE + ".Not", "must be an object", ""),
    "and with variable": (
        choice({"Variable": "$.a", "Not": {"Variable": "$.a", "IsNull": True}, "Next": "E"}),
        RULE + ".Variable", "no `Variable` of its own", "inside",
    ),
    "numeric text": (
        choice({"Variable": "$.a", "NumericEquals": "3", "Next": "E"}), RULE + ".NumericEquals",
        "a number, not `3`", "`NumericEqualsPath`",
    ),
    "numeric true": (
        choice({"Variable": "$.a", "NumericEquals": True, "Next": "E"}), RULE + ".NumericEquals", "a number", ""
    ),
    "string number": (
        choice({"Variable": "$.a", "StringEquals": 3, "Next": "E"}), RULE + ".StringEquals", "a text", ""
    ),
    "boolean text": (
        choice({"Variable": "$.a", "BooleanEquals": "true", "Next": "E"}), RULE + ".BooleanEquals",
        "true or false", "",
    ),
    "present text": (
        choice({"Variable": "$.a", "IsPresent": 1, "Next": "E"}), RULE + ".IsPresent", "true or false", ""
    ),
    "time text": (
        choice({"Variable": "$.a", "TimestampEquals": "noon", "Next": "E"}), RULE + ".TimestampEquals",
        "no time", "zone",
    ),
    "path operand": (
        choice({"Variable": "$.a", "StringEqualsPath": "b", "Next": "E"}), RULE + ".StringEqualsPath",
        "`$.`", "`$.b`",
    ),
    "variable": (choice({"Variable": "a", "IsNull": True, "Next": "E"}), RULE + ".Variable", "`$.`", ""),
    "catch no list": (flow_of(action(Catch={})), "$.States.X.Catch", "must be a list", ""),
    "catcher no object": (flow_of(action(Catch=["States.ALL"])), CATCHER, "must be an object", ""),
    "catcher key": (
        flow_of(action(Catch=[{"ErrorEquals": ["ActionTimeout"], "Next": "X", "Retry": 1}])), CATCHER + ".Retry",
        "no `Retry`", "",
    ),
    "catch nothing": (flow_of(action(Catch=[{"Next": "X"}])), CATCHER, "must have `ErrorEquals`", ""),
    "catch nowhere": (
        flow_of(action(Catch=[{"ErrorEquals": ["ActionTimeout"]}])), CATCHER, "must have `Next`", ""
    ),
    "catch a text": (
        flow_of(action(Catch=[{"ErrorEquals": "States.ALL", "Next": "X"}])), CATCHER + ".ErrorEquals", "a list", ""
    ),
    "catch misspelt": (
        flow_of(action(Catch=[{"ErrorEquals": ["ActionTimeOut"], "Next": "X"}])), CATCHER + ".ErrorEquals[0]",
        "never caught", "`ActionTimeout`",
    ),
    "given twice": (with_parameters(**{"a": 1, "a.$": "$.b"}), PATH, "given twice", "keep one"),
    "no name": (with_parameters(**{".$": "$.b"}), '$.States.X.Parameters[".$"]', "without a name", ""),
    "path a number": (with_parameters(**{"a.$": 3}), PATH, "must be a text", "without `.$`"),
    "path without root": (with_parameters(**{"a.$": "b.c"}), PATH, "`$.`", "`$.b.c`"),
    "path without dot": (with_parameters(**{"a.$": "$b"}), PATH, "no path", "`$.b`"),
    "path of context": (with_parameters(**{"a.$": "$$.Run"}), PATH, "no `$$`", "$._context"),
    "path ends in a dot": (with_parameters(**{"a.$": "$.b."}), PATH, "from its character 4", ""),
    "path with a sum": (with_parameters(**{"a.$": "$.b + 1"}), PATH, "no path", "`.=`"),
    "path deep inside": (
        with_parameters(a=[{"b": {"c.$": "d"}}]), '$.States.X.Parameters.a[0].b["c.$"]', "`$.`", "`$.d`"
    ),
    "private no list": (
        with_parameters(__Private_Parameters="a"), "$.States.X.Parameters.__Private_Parameters", "list of names", ""
    ),
    "private number": (
        with_parameters(__Private_Parameters=[1]), "$.States.X.Parameters.__Private_Parameters[0]", "must be a text", ""
    ),
    "expression number": (expression(3), EXPRESSION, "must be a text", "`a`"),
    "expression empty": (expression(" "), EXPRESSION, "empty", "''"),
    "expression broken": (expression("'a' + "), EXPRESSION, "no expression", "quotes"),
    "expression quote": (expression("'a"), EXPRESSION, "unterminated string", "quotes"),
    "expression backtick": (expression("`$.a + 1"), EXPRESSION, "backtick is not closed", ""),
    "expression bare path": (expression("$.a + 1"), EXPRESSION, "path stands in it", "backticks"),
    "expression && ": (expression("a && b"), EXPRESSION, "no expression", "`and`"),
    "expression statement": (expression("a = 1"), EXPRESSION, "no expression", "`==`"),
    "expression bad path": (expression("`a.b` + 'c'"), EXPRESSION, "`$.`", "`$.a.b`"),
    "expression lambda": (expression("(lambda: 1)()"), EXPRESSION, "`lambda` cannot", "known are"),
    "expression walrus": (expression("(b := 1)"), EXPRESSION, "`:=` cannot", ""),
    "expression bits": (expression("a | b"), EXPRESSION, "`|` cannot", ""),
    "expression bytes": (expression("b'x'"), EXPRESSION, "cannot be used", "JSON"),
    "expression dunder": (expression("a.__class__"), EXPRESSION, "`__class__` cannot", ""),
    "expression function": (expression("pathspilt(a)"), EXPRESSION, "`pathspilt`", "`pathsplit`"),
    "expression open": (expression("open('a')"), EXPRESSION, "no function `open`", "known are"),
    "expression method": (expression("a.spilt('/')"), EXPRESSION, "no method `spilt`", "`split`"),
    "expression call": (expression("a[0]()"), EXPRESSION, "can be called", ""),
    "expression no argument": (expression("len()"), EXPRESSION, "takes an argument", ""),
    "expression deep": (expression("-" * 3_900 + "1"), EXPRESSION, "no expression", "deeply"),
    "expression nul": (expression("a\0"), EXPRESSION, "no expression", ""),
    "web input type": (
        flow_of(ended("CreateWebInput", Parameters={"InputType": "Text", "Options": [{"Value": 1, "Label": "a"}]})),
        "$.States.X.Parameters.InputType", "no input of type `Text`", "Selection",
    ),
    "web input options": (
        flow_of(ended("CreateWebInput", Parameters={"InputType": "Selection", "Options": []})),
        "$.States.X.Parameters.Options", "at least one", "",
    ),
}  # fmt: skip

WARNINGS = {
    "no default": (
        flow_of({"Type": "Choice", "Choices": [{"Variable": "$.a", "IsNull": True, "Next": "E"}]}, E=ended()),
        "$.States.X", "`Default`", "",
    ),
    "transfer's time": (
        flow_of(action(ActionUrl=TRANSFER, WaitTime=60, Parameters=SENT)), "$.States.X.WaitTime", "60 s", "172800"
    ),
    "transfer's default time": (
        flow_of(action(ActionUrl=TRANSFER, Parameters=SENT)), "$.States.X", "300 s unless set", "172800"
    ),
    "long time": (flow_of(action(WaitTime=99_999_999)), "$.States.X.WaitTime", "longer than a run", "year"),
    "long wait": (flow_of(ended("Wait", Seconds=99_999_999)), "$.States.X.Seconds", "longer than a run", "year"),
    "result and parameters": (
        flow_of(ended(Result={}, Parameters={}, ResultPath="$.a")), "$.States.X.Parameters", "no effect", "keep one"
    ),
    "result with a path": (
        flow_of(ended(Result={"a.$": "$.b"}, ResultPath="$.a")), '$.States.X.Result["a.$"]', "constant", "`Parameters`"
    ),
    "constant path": (with_parameters(a="$.b.c"), "$.States.X.Parameters.a", "as a text", "`a.$`"),
    "filter": (with_parameters(**{"a.$": "$.b[?(@.c)]"}), PATH, "filters", ""),
    "private unknown": (
        with_parameters(secret="s", __Private_Parameters=["secert"]), "$.States.X.Parameters.__Private_Parameters[0]",
        "no parameter `secert`", "`secret`",
    ),
    "error unknown": (
        flow_of(action(Catch=[{"ErrorEquals": ["Site.Down"], "Next": "E"}]), E=ended()),
        CATCHER + ".ErrorEquals[0]", "not among the errors", "known are",
    ),
    "after everything": (
        flow_of(
            action(Catch=[{"ErrorEquals": [name], "Next": "E"} for name in ("States.All", "ActionTimeout")]),
            E=ended(),
        ),
        "$.States.X.Catch[1]", "never used", "first",
    ),
    "minus": (expression("a - 1"), EXPRESSION, "`-` is not known", "known are"),
    "f-string": (expression("f'{a}'"), EXPRESSION, "an f-string", ""),
    "int": (expression("int(a)"), EXPRESSION, "function `int` is not known", ""),
    "upper": (expression("a.upper()"), EXPRESSION, "method `upper` is not known", ""),
    "true": (expression("true"), EXPRESSION, "taken as a key", "True"),
    "present unquoted": (expression("is_present(a.b)"), EXPRESSION, "as a text", "is_present('a.b')"),
    "expression long": (expression("1" + "+1" * EXPRESSION_MAX), EXPRESSION, "not checked", ""),
    "action unknown": (
        provider(PERMISSION + "s"), "$.States.X.ActionUrl", "no action that is known", "manage_permission`"
    ),
    "transfer's input": (
        provider(TRANSFER, DATA=[ITEM], **{"source_endpoint.$": "$.a"}), "$.States.X.Parameters",
        "transfer needs `destination_endpoint`", "",
    ),
    "transfer's old input": (
        provider(TRANSFER, source_endpoint=UUID, destination_endpoint=UUID, transfer_items=[]), "$.States.X.Parameters",
        "needs `DATA`", "`transfer_items`",
    ),
    "transfer's item": (
        provider(TRANSFER, **{**SENT, "DATA": [ITEM, {"source_path": "/"}]}), "$.States.X.Parameters.DATA[1]",
        "needs `destination_path`", "",
    ),
    "transfer's items": (provider(TRANSFER, **{**SENT, "DATA": 1}), "$.States.X.Parameters.DATA", "must be a list", ""),
    "permission": (
        provider(PERMISSION, operation="DELETE", endpoint_id=UUID),
        "$.States.X.Parameters", "needs `rule_id`", "",
    ),
    "operation": (
        provider(PERMISSION, operation="create", endpoint_id=UUID),
        "$.States.X.Parameters.operation", "no operation `create`", "CREATE",
    ),
    "compute": (
        provider("https://compute.actions.globus.org/v3", endpoint_id=UUID, tasks=[{"args": []}]),
        "$.States.X.Parameters.tasks[0]", "needs `function_id`", "",
    ),
    "web input's option": (
        flow_of(ended("CreateWebInput", Parameters={"InputType": "Selection", "Options": [{"Value": 1}]})),
        "$.States.X.Parameters.Options[0]", "needs `Label`", "",
    ),
    "web input's id": (flow_of(ended("AwaitWebInput", Parameters={})), "$.States.X.Parameters", "`web_input_id`", ""),
    "state replaced": (
        flow_of(
            {**REPLACES, "Next": "E"}, E=ended(InputPath="$.dst", ResultPath="$.b")
        ),
        "$.States.X", "but `E` needs `$.dst`", '"ResultPath": "$.X"',
    ),
    "state replaced in so many words": (
        flow_of(
            {**REPLACES, "Next": "E", "ResultPath": "$"},
            E=ended(Parameters={"a.=": "dst + '/'"}),
        ),
        "$.States.X.ResultPath", "but `E` needs `$.dst`", "",
    ),
}  # fmt: skip


def told(definition: object, severity: str) -> list[tuple[str, str, str]]:
    return [(f.json_path, f.message, f.hint) for f in faults(definition) if f.severity == severity]


@pytest.mark.parametrize(("definition", "path", "message", "hint"), ERRORS.values(), ids=ERRORS)
def test_an_error_is_told_where_it_is(definition, path, message, hint):
    """What the service refuses, or what fails or never ends, is an error with its path and what to do."""
    found = told(definition, "error")

    assert [f for f in found if f[0] == path and message in f[1] and hint in f[2]], found


@pytest.mark.parametrize(("definition", "path", "message", "hint"), WARNINGS.values(), ids=WARNINGS)
def test_a_likely_mistake_is_a_warning(definition, path, message, hint):
    """What is likely a mistake, or not known to work, is one warning, and no error."""
    assert told(definition, "error") == []

    found = told(definition, "warning")
    assert len(found) == 1 and found[0][0] == path and message in found[0][1] and hint in found[0][2], found


SINGLE = (
    "next absent", "default absent", "unreachable", "endless", "operator misspelt", "retired", "no type", "wait twice",
)  # fmt: skip


@pytest.mark.parametrize("kind", SINGLE)
def test_one_mistake_is_one_fault(kind):
    """What follows from a mistake is not told a second time."""
    assert len(faults(ERRORS[kind][0])) == 1


def test_a_loop_that_nothing_leads_to_is_no_endless_one():
    """A state that is never reached need not end."""
    found = told(flow_of(ended(), Y={"Type": "Pass", "Next": "Y"}), "error")

    assert [path for path, _, _ in found] == ["$.States.Y"] and "nothing leads to" in found[0][1]


GOOD = {
    "the state that an action returns": flow_of(
        {**REPLACES, "Next": "E"}, E=ended(InputPath="$.details.x", ResultPath="$.b")
    ),
    "a key that a pass wrote anew": flow_of(
        {"Type": "Pass", "Parameters": {"dst.$": "$.a"}, "Next": "E"}, E=ended(InputPath="$.dst", ResultPath="$.b")
    ),
    "a key that the other of two ways keeps": flow_of(
        {"Type": "Choice", "Choices": [{"Variable": "$.a", "IsNull": True, "Next": "E"}], "Default": "R"},
        R={**REPLACES, "Next": "E"}, E=ended(InputPath="$.dst", ResultPath="$.b"),
    ),
    "names that a list makes for itself": flow_of(
        {**REPLACES, "Next": "E"}, E=ended(Parameters={"a.=": "[str(one) for one in details]"}, ResultPath="$.b"),
    ),
    "the answer to a web input": flow_of(
        {"Type": "AwaitWebInput", "Parameters": {"web_input_id.$": "$.a"}, "Next": "E"},
        E=ended(InputPath="$.response", ResultPath="$.b"),
    ),
    "a key that one of two ways keeps": flow_of(
        {"Type": "Choice", "Choices": [{"Variable": "$.a", "IsNull": True, "Next": "R"}], "Default": "E"},
        R={**REPLACES, "Next": "E"}, E=ended(InputPath="$.dst", ResultPath="$.b"),
    ),
    "a question whether a key is there": flow_of(
        {**REPLACES, "Next": "C"},
        C={"Type": "Choice", "Choices": [{"Variable": "$.a", "IsPresent": True, "Next": "E"}], "Default": "E"},
        E=ended(),
    ),
    "a key written since": flow_of(
        {**REPLACES, "Next": "P"},
        P={"Type": "Pass", "Result": {}, "ResultPath": "$.dst", "Next": "E"},
        E=ended(InputPath="$.dst", ResultPath="$.b"),
    ),
    "a pass that only passes": flow_of({"Type": "Pass", "Next": "E"}, E=ended(InputPath="$.dst", ResultPath="$.b")),
    "two rules of which one applies": flow_of(
        {"Type": "Choice", "Choices": [
            {"Variable": "$.a", "IsPresent": True, "Next": "E"}, {"Variable": "$.a", "IsPresent": False, "Next": "E"},
        ]}, E=ended(),
    ),
    "a text with a line break": expression("'failed:\n' + `$.why.Cause`"),
    "a backtick within a text": expression("'see `here`'"),
    "an expression over several lines": expression("a +\n  b"),
    "a path with a quoted key": with_parameters(**{"a.$": "$['batch-1'][0].x[1:]"}),
    "the whole state": with_parameters(**{"a.$": "$"}),
    "an address that nobody knows": flow_of(action(ActionUrl="https://flows.globus.org/flows/" + UUID)),
    "a registered API": flow_of(
        {"Type": "Action", "Handler": {"Type": "RegisteredAPI", "Id": UUID}, "ResultPath": "$.a", "End": True}
    ),
    "inputs that come as a whole": flow_of(action(ActionUrl=TRANSFER, WaitTime=90_000, InputPath="$.document")),
    "a loop that an error leaves": flow_of(
        {"Type": "Action", "ActionUrl": "https://e.org/a", "ResultPath": "$.a", "Next": "X",
         "Catch": [{"ErrorEquals": ["States.ALL"], "Next": "E"}]}, E=ended(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("definition", GOOD.values(), ids=GOOD)
def test_what_is_right_raises_no_alarm(definition):
    """Less common, but right: neither an error nor a warning."""
    assert faults(definition) == []


# ------------------------------------------------------------------------ nothing crashes

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.text(max_size=8), st.just([]), st.just({}),
    st.sampled_from(["$.a", "$", "`", "a.b + 1", "Action", "X", "States.ALL", "https://", "\ud800", [{}], [[]]]),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)  # fmt: skip


def spots(value: object, path: tuple = ()) -> list[tuple]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(spot for key, item in inside for spot in spots(item, (*path, key)))]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([BEAMTIME, POLLING]), st.data())
def test_no_change_of_a_flow_crashes_the_check(definition, data):
    """Whatever stands in a definition, there are faults or none, each at a path that leads into it."""
    changed = copy.deepcopy(definition)
    for _ in range(data.draw(st.integers(1, 3))):
        places = [spot for spot in spots(changed) if spot]
        if not places:
            break
        *way, last = data.draw(st.sampled_from(places))
        inside = changed
        for key in way:
            inside = inside[key]
        how = data.draw(st.sampled_from(["replace", "remove", "rename"]))
        if how == "replace":
            inside[last] = copy.deepcopy(data.draw(ODD))  # it may be changed in turn, and is drawn again
        elif how == "remove" or isinstance(inside, list):
            del inside[last]
        else:
            inside[data.draw(st.text(max_size=6))] = inside.pop(last)

    for fault in faults(changed):
        inside = changed
        for key in fault.path:
            inside = inside[key]
        assert fault.message and fault.severity in ("error", "warning") and fault.json_path == json_path(fault.path)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab.+*()[]{}'\"`$ ,:=<>!lenotrifsd0", max_size=40))
def test_no_expression_crashes_the_check(text):
    """Whatever an expression is, it is told or it passes."""
    assert all(fault.path[:2] == ("States", "X") for fault in faults(expression(text)))


@settings(max_examples=150, deadline=None)
@given(st.recursive(ODD, lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)), max_leaves=10))
def test_no_json_crashes_the_check(value):
    """Anything can be given as definition, schema, and input."""
    faults(value), schema_faults(value), input_faults({"type": "object"}, value)

    assert isinstance(faults(value), list)


def test_depth_is_bounded():
    """A definition that is nested without end is told, not followed."""
    deep: object = "$.a"
    for _ in range(100_000):
        deep = [deep]
    around: list = []
    around.append(around)

    for value in (deep, around, flow_of({"Type": deep})):
        found = faults(value)
        assert len(found) == 1 and "nested too deeply" in found[0].message and str(DEPTH_MAX) in found[0].hint


def test_size_is_bounded():
    """A definition larger than the limit is told with the limit."""
    for value in ({"Comment": "x" * (BYTES_MAX + 1)}, {"States": [None] * 1_000_000}):
        found = faults(value)
        assert len(found) == 1 and "too large" in found[0].message and f"{BYTES_MAX:,}" in found[0].hint


def test_a_large_definition_is_checked_in_seconds():
    """Time grows with size: a chain and a mesh of thousands of states are no trap."""
    count = 4_000
    chain = {f"S{n}": {"Type": "Pass", "Parameters": {f"k{n}": n}, "Next": f"S{n + 1}"} for n in range(count)}
    mesh = {
        f"S{n}": {"Type": "Choice", "Default": f"S{n + 1}", "Choices": [
            {"Variable": "$.a", "NumericEquals": to, "Next": f"S{to * 37 % count}"} for to in range(5)
        ]} for n in range(count)
    }  # fmt: skip
    astray = {f"S{n}": {"Type": "Pass", "Next": f"T{n}"} for n in range(20_000)}
    lost = {
        f"S{n}": {"Type": "Choice", "Default": f"S{n + 1}", "Choices": [
            {"Variable": "$.a", "NumericEquals": to, "Next": f"S{n}x{to}"} for to in range(20)
        ]} for n in range(1_500)
    }  # fmt: skip
    needy = {"S0": ended(Parameters={f"k{n}.$": f"$.k{n}" for n in range(50_000)}, ResultPath="$.a")}
    begun = time.monotonic()
    for states in (chain, mesh, astray, lost, needy):
        faults({"StartAt": "S0", "States": {**states, f"S{count}": ended()}})

    assert time.monotonic() - begun < 30


def test_faults_are_bounded_and_errors_come_first():
    """Of many faults the first are told, and warnings crowd no error out."""
    states = {f"S{n}": action(Waittime=1, WaitTime=99_999_999) for n in range(500)}
    found = faults({"StartAt": "S0", "States": states})

    assert len(found) == FAULTS_MAX and {fault.severity for fault in found} == {"error"}


@pytest.mark.parametrize(
    "value", [{1: 2}, {None: 2}, flow_of({"Type": {1}}), flow_of(b"x"), flow_of(float("nan")), 1 << 9999]
)
def test_what_is_no_json_is_told(value):
    """A value that JSON does not have is a fault."""
    assert len(faults(value)) == 1


# -------------------------------------------------------------------------------- inputs

SCHEMA = {
    "type": "object", "required": ["source", "batch"], "additionalProperties": False,
    "properties": {
        "source": {"type": "object", "format": "globus-collection", "required": ["id", "path"],
                   "properties": {"id": {"type": "string", "format": "uuid"}, "path": {"type": "string"}}},
        "batch": {"type": "object", "properties": {
            "count": {"type": "integer", "minimum": 1}, "kind": {"enum": ["raw", "final"]},
            "token": {"type": "string", "pattern": "^td-", "maxLength": 20},
        }},
        "group": {"type": "string", "format": "globus-principal"},
        "document": {"format": "globus-transfer-transfer#0.10"},
        "to": {"oneOf": [{"type": "string"}, {"type": "object", "required": ["id"]}]},
    },
}  # fmt: skip
INPUT = {
    "source": {"id": UUID, "path": "/v1"}, "batch": {"count": 3, "kind": "raw", "token": "td-abc"},
    "group": f"urn:globus:groups:id:{UUID}", "document": SENT, "to": {"id": 1},
}  # fmt: skip


def test_an_input_that_fits_has_no_fault():
    """An input as its schema wants it passes."""
    assert schema_faults(SCHEMA) == [] and input_faults(SCHEMA, INPUT) == []


@pytest.mark.parametrize(
    ("keys", "value", "path", "message", "hint"),
    [
        (("source",), None, "$", "`source` is missing", "write it"),
        (("sources",), 1, "$.sources", "no `sources`", "`source`"),
        (("batch", "count"), "3", "$.batch.count", "of type integer, not `3`", ""),
        (("batch", "count"), 0, "$.batch.count", "out of range", "minimum is 1"),
        (("batch", "kind"), "movie", "$.batch.kind", "none of the choices", '"raw", "final"'),
        (("batch", "token"), "abc", "$.batch.token", "pattern `^td-`", ""),
        (("batch", "token"), "td-" + "a" * 20, "$.batch.token", "length of 23", "maxLength is 20"),
        (("source", "id"), "krios", "$.source.id", "no uuid", "hexadecimal"),
        (("source",), {"id": "x", "path": "/"}, "$.source", "no globus-collection", '{"id"'),
        (("group",), "staff", "$.group", "no globus-principal", "urn:globus:groups:id:"),
        (("document",), {**SENT, "DATA": []}, "$.document", "no globus-transfer-transfer#0.10", "source_path"),
        (("to",), 5, "$.to", "none of the forms", "nearest"),
        (("source", "path"), "p" * INPUT_BYTES_MAX, "$", "at most 32,000", "manifest"),
    ],
)
def test_an_input_that_does_not_fit_is_told(keys, value, path, message, hint):
    """Each way to miss the schema has its path, and words for people."""
    given = copy.deepcopy(INPUT)
    inside = given
    for key in keys[:-1]:
        inside = inside[key]
    if value is None:
        del inside[keys[-1]]
    else:
        inside[keys[-1]] = value
    found = [(f.json_path, f.message, f.hint) for f in input_faults(SCHEMA, given)]

    assert [f for f in found if f[0] == path and message in f[1] and hint in f[2]], found


def test_formats_accept_what_is_written_alike():
    """A collection may be its UUID, a principal any of its URNs."""
    for name, value in (
        ("globus-collection", UUID), ("globus-principal", UUID), ("uuid", UUID.upper()), ("uuid", 3),
        ("globus-principal", f"urn:globus:auth:identity:{UUID}"),
    ):
        assert input_faults({"format": name}, value) == []


def test_a_schema_with_faults_is_told():
    """A schema that is none is an error; a misspelt format, which nobody would check, a warning."""
    broken = {"type": "object", "properties": {"a": {"type": "strin"}}}
    odd = {"properties": {"a": {"format": "globus-colection"}}}

    assert [(f.json_path, f.severity) for f in schema_faults(broken)] == [("$.properties.a.type", "error")]
    assert [(f.json_path, f.severity) for f in schema_faults(odd)] == [("$.properties.a.format", "warning")]
    assert "globus-collection" in schema_faults(odd)[0].hint
    assert "not checked" in input_faults(broken, {})[0].message


def test_a_schema_is_never_fetched(monkeypatch):
    """A reference to elsewhere is told; nothing is asked of the network."""

    asked: list[object] = []

    def refuse(*args: object, **keys: object) -> None:
        asked.append(args)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    found = input_faults({"$ref": "https://example.org/schema.json"}, {})

    assert asked == []
    assert "https://example.org/schema.json" in found[0].message and "not in it" in found[0].message


def test_a_schema_in_a_circle_is_told():
    """A reference to itself ends with a fault, not with the stack."""
    assert "without end" in input_faults({"$ref": "#"}, {})[0].message


FED = {"StartAt": "Move", "States": {
    "Move": {"Type": "Pass", "Parameters": {"a.$": "$.batch.path", "b.$": "$.count"}, "ResultPath": "$.moved",
             "Next": "Tell"},
    "Tell": {"Type": "Pass", "Parameters": {"a.$": "$.moved.a", "b.$": "$._context.run_id"}, "ResultPath": "$.told",
             "End": True},
}}  # fmt: skip


@pytest.mark.parametrize(("schema", "told"), [
    ({"properties": {"batch": {}, "count": {}}}, []),
    ({"properties": {"batch": {}, "counts": {}}}, [("$.States.Move.Parameters[\"b.$\"]", "warning")]),
    ({"properties": {"batch": {}, "counts": {}}, "additionalProperties": False},
     [("$.States.Move.Parameters[\"b.$\"]", "error")]),
    ({"properties": {"batch": {}}, "anyOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": {"properties": {"count": {}}}}},
     []),
    ({"properties": {"batch": {}}, "patternProperties": {"^c": {}}, "additionalProperties": False}, []),
    ({"type": "object"}, []),
    ({"$ref": "#"}, []),
    ([], []),
])  # fmt: skip
def test_what_a_flow_needs_and_nobody_gives_is_told(schema, told):
    """Each path begins in the input or in a result: an error where the schema allows nothing else, else a warning."""
    found = unfed(FED, schema)

    assert [(fault.json_path, fault.severity) for fault in found] == told
    assert all("`counts`" in fault.hint for fault in found)


def test_what_may_be_absent_is_not_needed():
    """A Choice may ask whether something is there, and so may an expression."""
    asks = {"Type": "Choice", "Choices": [{"Variable": "$.more", "IsPresent": True, "Next": "Done"}], "Default": "Done"}
    definition = {"StartAt": "Ask", "States": {"Ask": asks, "Done": {"Type": "Pass", "End": True}}}

    assert unfed(definition, {"properties": {"batch": {}}, "additionalProperties": False}) == []
    definition["States"]["Done"]["Parameters"] = {"a.=": "is_present(`$.more`)"}
    (fault,) = unfed(definition, {"properties": {"batch": {}}, "additionalProperties": False})
    assert fault.severity == "warning"


def test_what_cannot_be_judged_in_time_is_a_warning(monkeypatch):
    """References that branch at each level, or a pattern on one text, would take longer than anybody waits."""
    monkeypatch.setattr(judging, "JUDGE_S", 1.0)
    names = [f"d{n}" for n in range(30)]
    defs = {
        name: {"anyOf": [{"allOf": [{"$ref": f"#/$defs/{after}"}, {"maxLength": 0}]},
                         {"allOf": [{"$ref": f"#/$defs/{after}"}, {"minLength": 9}]}]}
        for name, after in itertools.pairwise(names)
    }  # fmt: skip
    for schema in (
        {"$ref": "#/$defs/d0", "$defs": {**defs, "d29": {"type": "string"}}},
        {"pattern": "^(a+)+$"},
    ):
        (fault,) = judge_input(schema, "a" * 40 + "!")
        assert (fault.severity, "within 1 s" in fault.message) == ("warning", True)


def test_what_is_judged_apart_has_the_same_faults():
    """In a child or not, with a place for each."""
    schema = {"properties": {"s": {"pattern": "^b$"}, "t": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "number"}}}
    given = {"s": "a", "t": "x"}

    assert judge_input(schema, given) == input_faults(schema, given)
    assert {fault.json_path for fault in judge_input(schema, given)} == {"$.s", "$.t"}


# --------------------------------------------------------------------------- the command

YAML = """\
StartAt: Deliver
States:
  Deliver:
    Type: Action
    ActionUrl: https://transfer.actions.globus.org/transfer
    WaitTime: 60
    ResultPath: $.delivered
    Parameters:
      source_endpoint.$: $.src.id
      destination_endpoint.$: dst.id
      DATA:
        - source_path.$: $.src.path
          destination_path: /v1
    Next: Shore
    Catch: [{ErrorEquals: [ActionTimeOut], Next: Lost}]
  Lost: {Type: Fail, Eror: Lost}
"""
PLACES = [  # line, column, path, severity
    (6, 15, "$.States.Deliver.WaitTime", "warning"),
    (10, 31, '$.States.Deliver.Parameters["destination_endpoint.$"]', "error"),
    (14, 11, "$.States.Deliver.Next", "error"),
    (15, 28, "$.States.Deliver.Catch[0].ErrorEquals[0]", "error"),
    (16, 22, "$.States.Lost.Eror", "error"),
]
JSON = """\
{"StartAt": "Deliver",
 "States": {
\t"Deliver": {"Type": "Action", "ActionUrl": "https://e.org/a\\u0020b",
    "Comment": "é \\"quoted\\" {[,:", "End": true, "Waittime": 5, "Catch": [{
      "ErrorEquals": ["States.ALL",  3 ], "Next": "Lost"}]},
  "Lost": {
    "Type": "Fail", "Error": "a", "ErrorPath":
      "b" }}}
"""
JSON_PLACES = [
    (3, 45, "$.States.Deliver.ActionUrl", "error"),
    (4, 50, "$.States.Deliver.Waittime", "error"),
    (5, 38, "$.States.Deliver.Catch[0].ErrorEquals[1]", "error"),
    (7, 35, "$.States.Lost.ErrorPath", "error"),
    (8, 7, "$.States.Lost.ErrorPath", "error"),
]


def run(capsys, *args: object) -> tuple[int, str, str]:
    code = cli.run([str(arg) for arg in args])
    return code, *capsys.readouterr()


def validate(capsys, *args: object) -> tuple[int, dict]:
    code, out, _ = run(capsys, "globus", "flow", "validate", *args, "-F", "json")
    return code, json.loads(out)


def placed(answer: dict) -> list[tuple]:
    return [(f["line"], f["column"], f["path"], f["severity"]) for f in answer["faults"]]


@pytest.mark.parametrize(
    ("name", "text", "places"), [("a.yaml", YAML, PLACES), ("a.json", JSON, JSON_PLACES)], ids=["yaml", "json"]
)
def test_faults_have_exact_places(tmp_path, capsys, name, text, places):
    """A fault is told at the key or value it is about, in the order of the file."""
    (tmp_path / name).write_text(text)
    code, answer = validate(capsys, tmp_path / name)

    assert placed(answer) == places
    assert code == 3 and answer["ok"] is False
    assert set(answer["faults"][0]) == {"file", "line", "column", "path", "severity", "message", "hint"}
    assert {fault["file"] for fault in answer["faults"]} == {str(tmp_path / name)}


def test_what_is_missing_is_told_at_its_owner(tmp_path, capsys):
    """A state without a way on is told at its name."""
    (tmp_path / "a.yaml").write_text("StartAt: A\nStates:\n  A:\n    Type: Pass\n")

    assert placed(validate(capsys, tmp_path / "a.yaml")[1]) == [(3, 3, "$.States.A", "error")]


@pytest.mark.parametrize("form", ["json", "indented", "yaml"])
def test_a_flow_without_faults_is_told_so(tmp_path, capsys, form):
    """Exit code 0, in either language."""
    from ruamel.yaml import YAML as Writer

    file = tmp_path / ("flow.yaml" if form == "yaml" else "flow.json")
    if form == "yaml":
        with file.open("w") as opened:
            Writer(typ="safe", pure=True).dump(copy.deepcopy(BEAMTIME), opened)
    else:
        file.write_text(json.dumps(BEAMTIME, indent="\t" if form == "indented" else None))

    assert validate(capsys, file) == (0, {"ok": True, "faults": []})
    assert run(capsys, "globus", "flow", "validate", file)[:2] == (0, "no faults\n")


def test_warnings_change_no_exit_code(tmp_path, capsys):
    """A flow with warnings alone is in order."""
    (tmp_path / "a.json").write_text(json.dumps(WARNINGS["minus"][0]))
    code, answer = validate(capsys, tmp_path / "a.json")

    assert (code, answer["ok"], len(answer["faults"])) == (0, True, 1)


def test_people_see_the_line_and_what_to_do(tmp_path, capsys):
    """Text has file:line:column, the line with a mark, and the hint."""
    (tmp_path / "a.yaml").write_text(YAML)
    code, out, err = run(capsys, "globus", "flow", "validate", tmp_path / "a.yaml")

    assert code == 3 and "4 errors, 1 warning" in err
    assert f"{tmp_path}/a.yaml:14:11: error: $.States.Deliver.Next: there is no state `Shore`\n" in out
    assert "\n        Next: Shore\n" + " " * 14 + "^\n" in out
    assert "hint: did you mean `ActionTimeout`?" in out


@pytest.mark.parametrize(
    ("name", "content", "line", "column", "message"),
    [
        ("a.json", b'{"StartAt": "X",\n "States": {"X": {"Type" "Pass"}}}', 2, 26, "not JSON"),
        ("a.json", b'{"StartAt": "X" "States"', 1, 17, "not JSON"),
        ("a.json", b"", 1, 1, "empty"),
        ("a.json", b'{"StartAt": NaN}', 0, 0, "no NaN"),
        ("a.json", b"[" * 200_000, 0, 0, "nested too deeply"),
        ("a.json", b'{"n": ' + b"9" * 5_000 + b"}", 0, 0, "Exceeds the limit"),
        ("a.json", b'{"StartAt": "\xff"}', 1, 14, "not UTF-8: byte 0xFF"),
        ("a.json", b" " * (BYTES_MAX + 1), 0, 0, "larger than 2,000,000 bytes"),
        ("a.yaml", b"StartAt: A\n" + b"#" * 1_000_000, 0, 0, "as YAML, at most 1,000,000 bytes"),
        ("a.yaml", b"StartAt: A\nStates: B: 1\n", 2, 10, "a `key: value` cannot stand here"),
        ("a.yaml", b"", 1, 1, "empty"),
        ("a.yaml", b"[" * 1_000, 1, 201, "nested too deeply"),
        ("a.yaml", b"StartAt: A\nStates: {A: {Type: Pass, Type: Pass, End: true}}", 2, 26, "written twice"),
        ("a.json", b'{"StartAt": "A",\n "States": {"A": {"Type": "Pass",\n"End": true, "End": true}}}', 3, 14, "twice"),
        ("a.yaml", b"Comment: &x [1]\nStates: *x\nStartAt: !!python/object:os.x A", 3, 10, "tags such"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_told(tmp_path, capsys, name, content, line, column, message):
    """Damage, excess and slips of the pen have their place too, and exit code 3."""
    (tmp_path / name).write_bytes(content)
    code, answer = validate(capsys, tmp_path / name)
    found = [f for f in answer["faults"] if message in f["message"]]

    assert code == 3 and [(f["line"], f["column"], f["path"]) for f in found] == [(line, column, "$")], answer


def test_a_comma_too_many_is_explained(tmp_path, capsys):
    """The commonest slip in JSON has its own hint."""
    (tmp_path / "a.json").write_text('{"StartAt": "X", "States": {"X": {"Type": "Pass", "End": true,}}}')

    assert "remove the comma" in validate(capsys, tmp_path / "a.json")[1]["faults"][0]["hint"]


NOTES = {"StartAt": "Note", "States": {"Note": {"Type": "Pass", "End": True}}}


def test_the_input_is_checked_by_its_schema(tmp_path, capsys):
    """Faults of each file are told with its name, the definition's first."""
    files = {}
    given = {**INPUT, "group": "staff"}
    for name, value in (("flow", NOTES), ("schema", SCHEMA), ("input", given)):
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(value, indent=1))
    code, answer = validate(capsys, files["flow"], "--schema", files["schema"], "--input", files["input"])

    assert code == 3 and [(f["file"], f["path"]) for f in answer["faults"]] == [(str(files["input"]), "$.group")]


def test_standard_input_is_read(monkeypatch, capsys):
    """`-` is standard input, in either language."""
    for text, code in ((json.dumps(POLLING), 0), (YAML, 3)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert validate(capsys, "-")[0] == code


@pytest.mark.parametrize("args", [(), ("nowhere.json",), ("-", "--schema", "-"), ("-", "--input", "-")])
def test_wrong_use_ends_with_2(capsys, args):
    """Absent files, and options that do not go together, are usage errors."""
    assert run(capsys, "globus", "flow", "validate", *args)[0] == 2


@settings(max_examples=60, deadline=None)
@given(st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)),
    max_leaves=12,
), st.sampled_from([None, 0, 1, "\t"]), st.booleans())  # fmt: skip
def test_every_value_of_json_has_its_place(value, indent, ascii_only):
    """Each key and value of any JSON is found where it is written."""
    written = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    document = flow.Document("a.json")
    flow._read_json(document, written)
    lines = written.split("\n")

    assert document.value == value and set(document.places) == set(spots(value))
    for path, (_, (line, column)) in document.places.items():
        inside = value
        for key in path:
            inside = inside[key]
        rest = "\n".join([lines[line - 1][column - 1 :], *lines[line:]])
        assert json.JSONDecoder().raw_decode(rest)[0] == inside


def test_a_fault_is_a_value():
    """Faults can be compared and kept in sets."""
    assert len({DefinitionFault(("a", 0), "m"), DefinitionFault(("a", 0), "m")}) == 1
