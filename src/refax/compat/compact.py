"""placeholder"""


def current_module():
  return None
