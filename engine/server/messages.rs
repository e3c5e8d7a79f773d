//! Owns the shape of `messages` and `tools` as a chat template may rely on it: roles it knows, text content, complete
//! tool calls. Whatever else a message carries is passed on as it came. Knows no template.

use serde_json::{Map, Value};

use super::errors::{ApiError, quoted};

/// Most declared tools, and most tool calls of one message.
pub(super) const MAX_TOOLS: usize = 128;
const MAX_NAME_BYTES: usize = 256;

type Message = Map<String, Value>;

/// Checks and normalises a conversation: `developer` becomes `system`, either name of the reasoning field becomes both,
/// `null` fields vanish, and content parts are joined by newlines where the template reads only strings.
///
/// # Errors
/// 400 with the path of the first wrong field, as `messages[3].content[0].type`.
pub(super) fn validate(messages: Vec<Value>, template_reads_parts: bool) -> Result<Vec<Value>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "is empty"));
    }
    let checked = messages.into_iter().enumerate().map(|(index, message)| {
        let Value::Object(message) = message else {
            return Err(ApiError::invalid(format!("messages[{index}]"), "must be an object"));
        };
        let message = one(message, template_reads_parts);
        message.map(Value::Object).map_err(|error| error.within(format_args!("messages[{index}]")))
    });
    checked.collect()
}

fn one(mut message: Message, template_reads_parts: bool) -> Result<Message, ApiError> {
    message.retain(|key, value| key == "content" || !value.is_null());
    let role = match message.get("role").map(Value::as_str) {
        None => return Err(ApiError::invalid("role", "is missing")),
        Some(Some("developer")) => {
            message.insert("role".into(), "system".into());
            "system"
        }
        Some(Some("system")) => "system",
        Some(Some("user")) => "user",
        Some(Some("assistant")) => "assistant",
        Some(Some("tool")) => "tool",
        Some(Some("function")) => {
            return Err(ApiError::unsupported("role", "use 'tool' instead of 'function'"));
        }
        Some(_) => {
            return Err(ApiError::invalid("role", "must be system, developer, user, assistant or tool"));
        }
    };
    for name in ["name", "tool_call_id"] {
        match message.get(name) {
            None => {}
            Some(Value::String(text)) if text.len() <= MAX_NAME_BYTES => {}
            Some(_) => {
                let problem = format!("must be a string of at most {MAX_NAME_BYTES} bytes");
                return Err(ApiError::invalid(name, problem));
            }
        }
    }
    if role == "assistant" {
        reasoning(&mut message)?;
        tool_calls(&mut message)?;
    } else if message.contains_key("tool_calls") {
        return Err(ApiError::invalid("tool_calls", "is only allowed in assistant messages"));
    }
    let optional = message.contains_key("tool_calls") || message.contains_key("reasoning_content");
    let content = message.entry("content").or_insert(Value::Null);
    match content {
        Value::String(_) => {}
        Value::Null if optional => {}
        Value::Null => return Err(ApiError::invalid("content", "is missing")),
        Value::Array(parts) => {
            let texts = part_texts(parts)?;
            if !template_reads_parts {
                *content = Value::String(texts.join("\n"));
            }
        }
        _ => return Err(ApiError::invalid("content", "must be a string or an array of parts")),
    }
    Ok(message)
}

fn part_texts(parts: &[Value]) -> Result<Vec<&str>, ApiError> {
    if parts.is_empty() {
        return Err(ApiError::invalid("content", "is an empty array"));
    }
    let texts =
        parts.iter().enumerate().map(|(index, part)| match part.get("type").and_then(Value::as_str) {
            Some("text") => {
                let text = part.get("text").and_then(Value::as_str);
                text.ok_or_else(|| ApiError::invalid(format!("content[{index}].text"), "must be a string"))
            }
            Some(
                kind @ ("image_url" | "image" | "input_image" | "input_audio" | "video_url" | "file"
                | "refusal"),
            ) => {
                let problem = format!("parts of type '{kind}'; only text is read");
                Err(ApiError::unsupported(format!("content[{index}].type"), &problem))
            }
            _ => Err(ApiError::invalid(format!("content[{index}].type"), "must be 'text'")),
        });
    texts.collect()
}

/// Servers disagree on the name of the field; templates know either.
fn reasoning(message: &mut Message) -> Result<(), ApiError> {
    const NAMES: [&str; 2] = ["reasoning_content", "reasoning"];
    for name in NAMES {
        if message.get(name).is_some_and(|text| !text.is_string()) {
            return Err(ApiError::invalid(name, "must be a string"));
        }
    }
    if let Some(text) = NAMES.iter().find_map(|name| message.get(*name)).cloned() {
        for name in NAMES {
            message.entry(name).or_insert_with(|| text.clone());
        }
    }
    Ok(())
}

fn tool_calls(message: &mut Message) -> Result<(), ApiError> {
    let calls = match message.get("tool_calls") {
        None => return Ok(()),
        Some(Value::Array(calls)) if calls.len() <= MAX_TOOLS => calls,
        Some(Value::Array(_)) => {
            return Err(ApiError::invalid("tool_calls", format_args!("has more than {MAX_TOOLS} items")));
        }
        Some(_) => return Err(ApiError::invalid("tool_calls", "must be an array")),
    };
    if calls.is_empty() {
        message.shift_remove("tool_calls");
        return Ok(());
    }
    for (index, call) in calls.iter().enumerate() {
        let wrong = |field: &str, problem: &str| {
            Err(ApiError::invalid(format!("tool_calls[{index}].{field}"), problem))
        };
        if call.get("type").is_some_and(|kind| kind != "function") {
            return wrong("type", "must be 'function'");
        }
        if !call.get("id").is_some_and(Value::is_string) {
            return wrong("id", "must be a string");
        }
        let Some(function) = call.get("function").and_then(Value::as_object) else {
            return wrong("function", "must be an object");
        };
        if function.get("name").and_then(Value::as_str).is_none_or(str::is_empty) {
            return wrong("function.name", "must be a non-empty string");
        }
        if !matches!(function.get("arguments"), None | Some(Value::String(_) | Value::Object(_))) {
            return wrong("function.arguments", "must be a string of JSON");
        }
    }
    Ok(())
}

/// The conversation with the arguments of its tool calls as objects, for templates that walk through them. `None` if
/// there are none to parse.
pub(super) fn with_parsed_arguments(messages: &[Value]) -> Option<Vec<Value>> {
    let mut changed = false;
    let mut messages = messages.to_vec();
    for call in messages.iter_mut().filter_map(|m| m.get_mut("tool_calls")?.as_array_mut()).flatten() {
        let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
        let parsed = arguments.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
        if let Some(parsed @ Value::Object(_)) = parsed {
            *arguments = parsed;
            changed = true;
        }
    }
    changed.then_some(messages)
}

/// Checks tool declarations; they are rendered into the prompt as they are.
///
/// # Errors
/// 400 with the path of the first wrong field, as `tools[0].function.name`.
pub(super) fn tools(tools: Vec<Value>) -> Result<Vec<Value>, ApiError> {
    for (index, tool) in tools.iter().enumerate() {
        let wrong =
            |field: &str, problem: String| Err(ApiError::invalid(format!("tools[{index}]{field}"), problem));
        match tool.get("type").and_then(Value::as_str) {
            Some("function") => {}
            Some(kind) => return wrong(".type", format!("must be 'function', not {}", quoted(kind))),
            None => return wrong(".type", "must be 'function'".into()),
        }
        let Some(function) = tool.get("function").and_then(Value::as_object) else {
            return wrong(".function", "must be an object".into());
        };
        let name = function.get("name").and_then(Value::as_str).unwrap_or_default();
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
            return wrong(".function.name", "must be 1 to 64 letters, digits, '_', '-' or '.'".into());
        }
        if !matches!(function.get("description"), None | Some(Value::Null | Value::String(_))) {
            return wrong(".function.description", "must be a string".into());
        }
        if !matches!(function.get("parameters"), None | Some(Value::Null | Value::Object(_))) {
            return wrong(".function.parameters", "must be an object".into());
        }
    }
    Ok(tools)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn parts_are_joined_where_the_template_reads_strings() {
        let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        let message = json!({"role": "developer", "content": parts, "name": null, "cache_control": {"type": "ephemeral"}});
        let joined = validate(vec![message.clone()], false).expect("a valid message");
        assert_eq!(
            joined[0],
            json!({"role": "system", "content": "a\nb", "cache_control": {"type": "ephemeral"}})
        );
        assert_eq!(validate(vec![message], true).expect("a valid message")[0]["content"], parts);
    }

    #[test]
    fn either_name_of_the_reasoning_is_both() {
        for name in ["reasoning", "reasoning_content"] {
            let checked = validate(vec![json!({"role": "assistant", "content": "x", name: "why"})], true);
            let message = checked.expect("a valid message").remove(0);
            assert_eq!(
                (&message["reasoning"], &message["reasoning_content"]),
                (&json!("why"), &json!("why"))
            );
        }
    }

    #[test]
    fn arguments_are_parsed_only_if_they_are_objects() {
        let call = |arguments: Value| json!({"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": arguments}}]});
        let parsed = with_parsed_arguments(&[call(json!("{\"a\": 1}"))]).expect("something to parse");
        assert_eq!(parsed[0], call(json!({"a": 1})));
        for other in [json!("[1]"), json!("{"), json!(""), json!({"a": 1})] {
            assert_eq!(with_parsed_arguments(&[call(other)]), None);
        }
    }
}
