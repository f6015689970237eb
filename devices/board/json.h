// JSON in the making.

#pragma once

#include <cmath>
#include <cstdio>
#include <string>

namespace netship {

inline std::string quoted(const std::string& text) {
  std::string json = "\"";
  for (char c : text) {
    auto code = static_cast<unsigned char>(c);
    char escaped[8];
    std::snprintf(escaped, sizeof escaped, "\\u%04x", code);
    if (c == '"' || c == '\\' || code < 0x20 || code > 0x7e)
      json += escaped;
    else
      json += c;
  }
  return json + '"';
}

class Object {
 public:
  void add(const char* name, const std::string& json) {
    text_ += (text_.empty() ? "{" : ", ") + quoted(name) + ": " + json;
  }
  void add_text(const char* name, const std::string& text) {
    add(name, text.empty() ? "null" : quoted(text));
  }
  void add_number(const char* name, double value, bool known = true) {
    char text[32];
    std::snprintf(text, sizeof text, "%.12g", value);
    add(name, known && std::isfinite(value) ? text : "null");
  }
  std::string text() const { return text_ + "}"; }

 private:
  std::string text_;
};

}  // namespace netship
