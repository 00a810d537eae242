//! The fields of a request, taken one by one: what nobody took is refused, so that nothing is ignored silently.

use serde_json::{Map, Value};

use crate::serve::reply::Refusal;

/// The fields that are left.
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    /// Those of a JSON object; objects that clients wrap vendors' fields in are unwrapped, and what is null is left out.
    ///
    /// # Errors
    /// Something other than an object.
    pub fn of(value: Value) -> Result<Self, Refusal> {
        let Value::Object(mut fields) = value else {
            return Err(Refusal::bad("the body must be a JSON object, or a form"));
        };
        for name in ["extra_body", "extra_params", "video_params"] {
            match fields.remove(name) {
                None | Some(Value::Null) => {}
                Some(Value::Object(inner)) => {
                    for (name, value) in inner {
                        fields.entry(name).or_insert(value);
                    }
                }
                Some(_) => return Err(Refusal::field(name, "must be a JSON object")),
            }
        }
        fields.retain(|_, value| !value.is_null());
        Ok(Self(fields))
    }

    /// The field `name` as it is.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name)
    }

    /// A text.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, Refusal> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(Refusal::field(name, "must be a text")),
        }
    }

    /// A number, also in a text, as forms and OpenAI's `seconds` have it.
    pub fn number(&mut self, name: &str) -> Result<Option<f64>, Refusal> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = match &value {
            Value::Number(number) => number.as_f64(),
            Value::String(text) => text.trim().parse().ok(),
            _ => None,
        };
        match number.filter(|number: &f64| number.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => Err(Refusal::field(name, format!("{value} is not a number"))),
        }
    }

    /// A whole number from 0 on.
    pub fn whole<T: TryFrom<u64>>(&mut self, name: &str) -> Result<Option<T>, Refusal> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = match &value {
            Value::Number(number) => number.as_u64(),
            Value::String(text) => text.trim().parse().ok(),
            _ => None,
        };
        match number.and_then(|number| T::try_from(number).ok()) {
            Some(number) => Ok(Some(number)),
            None => Err(Refusal::field(name, format!("{value} is not a whole number that fits"))),
        }
    }

    /// Refuses what is left, except what asks for nothing.
    ///
    /// # Errors
    /// The first field that is not known, or not supported.
    pub fn finish(mut self) -> Result<(), Refusal> {
        // Says who asks; nobody here needs it.
        self.0.remove("user");
        let off: [(&str, &[Value]); 6] = [
            ("enable_teacache", &[Value::Bool(false)]),
            ("generate_sound", &[Value::Bool(false)]),
            ("enable_frame_interpolation", &[Value::Bool(false)]),
            (
                "quality",
                &[
                    Value::String(String::new()),
                    Value::String("standard".into()),
                    Value::String("default".into()),
                ],
            ),
            ("output_quality", &[Value::String("default".into())]),
            ("n", &[Value::from(1)]),
        ];
        for (name, neutral) in off {
            // In a form everything is a text.
            let is_neutral = |value: &Value| {
                let parsed = value.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
                neutral.contains(value) || parsed.is_some_and(|value| neutral.contains(&value))
            };
            if self.0.get(name).is_some_and(is_neutral) {
                self.0.remove(name);
            }
        }
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => {
                Err(Refusal::field(name, "is not supported here; /openapi.json lists the fields that are"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// What clients send by default passes; what would change the clip and is not done is refused by name.
    #[test]
    fn fields_that_nobody_takes_are_refused() {
        let left = |value: Value| {
            let mut fields = Fields::of(value).unwrap();
            fields.text("prompt").unwrap();
            fields.whole::<u32>("fps").unwrap();
            fields.finish().map_err(|refusal| refusal.message().to_owned())
        };
        let neutral = json!({ "prompt": "a fox", "user": "me", "enable_teacache": false, "quality": "standard", "lora": null });
        assert_eq!(left(neutral), Ok(()));
        assert_eq!(left(json!({ "prompt": "a fox", "extra_body": { "fps": "16" } })), Ok(()));
        for name in ["generate_sound", "enable_teacache", "rollout"] {
            let why = left(json!({ "prompt": "a fox", name: true })).unwrap_err();
            assert!(why.starts_with(name), "{why}");
        }
        assert!(Fields::of(json!({ "fps": -1 })).unwrap().whole::<u32>("fps").is_err());
        assert!(Fields::of(json!(["a fox"])).is_err());
    }
}
