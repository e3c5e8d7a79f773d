//! Files and command lines as they should not be. Whatever comes in, the answer is an error that names the file, tensor
//! or field, soon and without much memory; never a panic. Requests over HTTP are in `server.rs`, tokenizer files and
//! templates in `tokenizer_files.rs` and `chat_template.rs`; the fuzz targets of all of them run here on mutated seeds.

#[path = "bad_input/commands.rs"]
mod commands;
#[path = "bad_input/config.rs"]
mod config;
#[path = "bad_input/fuzz.rs"]
mod fuzz;
#[path = "bad_input/index.rs"]
mod index;
#[path = "bad_input/paths.rs"]
mod paths;
#[path = "bad_input/safetensors.rs"]
mod safetensors;
#[path = "bad_input/shapes.rs"]
mod shapes;
#[path = "bad_input/tiny.rs"]
mod tiny;
#[path = "bad_input/weights.rs"]
mod weights;
